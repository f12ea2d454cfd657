"""How to fit a model onto devices: memory by part, what fits, what it sends; from shapes, in a second.

    python -m aquila.plan MODEL --devices N --memory 64GB [--seq-length S] [--precision bf16]

Prints memory for ZeRO 0 to 3 and offload, the best set-up that fits each, ready to paste, and the
communication time by link speed. Exit status 0 when something fits, else 2.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from aquila.config import ModelConfig, find_model_dir, load_model_config
from aquila.errors import EXIT_USER_ERROR, UserError, run_command
from aquila.launch.code import ROOT
from aquila.launch.memory import ACCELERATOR_FIXED, GIB, Estimate, Setup, bytes_sent, estimate

UNITS = {"GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6, "G": 10**9}
LINKS = {"25 Gbit/s": 25, "100 Gbit/s": 100, "200 Gbit/s": 200, "400 Gbit/s": 400, "200 GB/s": 1600}
"""Gbit/s of the slowest link of the ring: Ethernet and InfiniBand between nodes, links within one."""
FREE_SHARE = 0.06
"""Share of the memory that is left alone: allocators cannot use every gap."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
STAGES = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))
HALF_SPEED_TOKENS = 512
"""Micro batches of so many tokens reach about half of a device's speed (a rule of thumb)."""


class Choice(NamedTuple):
    """A set-up with what it takes; `fits` says whether the memory is enough."""

    setup: Setup
    estimate: Estimate
    fits: bool


def main() -> int:
    arguments = _parse()
    model_dir = find_model_dir(arguments.model, ROOT)
    model = load_model_config(model_dir)
    memory = parse_memory(arguments.memory)
    base = Setup(
        devices=arguments.devices,
        batch_size=1,
        seq_length=arguments.seq_length or model.max_seq_len,
        precision=arguments.precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        attention=arguments.attention,
        bucket=arguments.bucket,
        fixed=ACCELERATOR_FIXED,
    )
    if base.seq_length > model.max_seq_len:
        raise UserError(f"--seq-length {base.seq_length} is longer than max_seq_len {model.max_seq_len}")
    choices = [best(model, replace(base, zero_stage=s, offload=o), memory) for s, o in STAGES]
    if arguments.json:
        print(json.dumps(as_json(model, choices, memory), indent=1))
    else:
        show(arguments.model, model, choices, memory)
    return 0 if any(choice.fits for choice in choices) else EXIT_USER_ERROR


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m aquila.plan", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder under checkpoints_in/, or a path: only config.json is read")
    parser.add_argument("--devices", type=positive, required=True, help="devices of all nodes together")
    parser.add_argument("--memory", required=True, help="of one device: 64GB, 80GiB")
    parser.add_argument("--seq-length", type=positive, help="default: the model's max_seq_len")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--gradient-accumulation-steps", type=positive, default=1)
    parser.add_argument("--attention", choices=("fused", "triangle", "reference"), default="fused")
    parser.add_argument(
        "--bucket", type=float, default=1e8, help="reduce_bucket_size of deepspeed.json (default 1e8)"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def parse_memory(text: str) -> float:
    """'64GB' (10^9) or '80GiB' (2^30) to bytes. Raises `UserError`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"--memory {text}: write a number and its unit, such as 64GB or 80GiB")
    return float(match[1]) * UNITS[match[2].upper()]


def best(model: ModelConfig, base: Setup, memory: float) -> Choice:
    """The fastest set-up of this ZeRO stage that fits; the smallest one when none does."""
    usable = memory * (1 - FREE_SHARE)
    layers = model.n_layers
    found: list[tuple[float, Choice]] = []
    for batch_size in BATCHES:
        for recomputed in range(layers + 1):
            setup = replace(base, batch_size=batch_size, checkpointed_layers=recomputed)
            choice = Choice(setup, estimate(model, setup), True)
            if choice.estimate.peak <= usable:
                found.append((speed(setup, layers), choice))
                break  # fewer recomputed layers are faster, and this is the fewest
    if found:
        return max(found, key=lambda item: item[0])[1]
    smallest = replace(base, batch_size=1, checkpointed_layers=layers)
    return Choice(smallest, estimate(model, smallest), False)


def speed(setup: Setup, layers: int) -> float:
    """What to compare set-ups by: larger micro batches fill the device, recomputation adds a third."""
    full = setup.tokens / (setup.tokens + HALF_SPEED_TOKENS)
    return full / (1 + setup.checkpointed_layers / layers / 3)


def stage_name(setup: Setup) -> str:
    return f"ZeRO-{setup.zero_stage}" + (" + offload" if setup.offload else "")


def paste(setup: Setup) -> str:
    """The set-up as words for a launch script."""
    words = {
        "batch_size": setup.batch_size,
        "ckpoint_layer": setup.checkpointed_layers,
        "zero_stage": setup.zero_stage,
    }
    return " ".join(f"{key}={value}" for key, value in words.items())


def show(name: str, model: ModelConfig, choices: list[Choice], memory: float) -> None:
    base = choices[0].setup
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{name}: {model.parameter_count():,} parameters, sequence {base.seq_length}, {base.precision}, "
        f"{base.devices} device(s) of {memory / 1e9:.1f} GB ({memory / GIB:.1f} GiB)"
    )
    table = Table("GiB a device", *(stage_name(choice.setup) for choice in choices))
    columns = [choice.estimate.rows() for choice in choices]
    for row in zip(*columns, strict=True):
        table.add_row(row[0][0], *(f"{value / GIB:.2f}" for _, value in row))
    table.add_section()
    table.add_row("peak", *(f"{choice.estimate.peak / GIB:.1f}" for choice in choices))
    table.add_row("at", *(choice.estimate.fullest for choice in choices))
    table.add_row("on the host, each", *(f"{choice.estimate.host / GIB:.1f}" for choice in choices))
    table.add_row("fits", *("yes" if choice.fits else "no" for choice in choices))
    table.add_row("batch_size", *(str(choice.setup.batch_size) for choice in choices))
    table.add_row("ckpoint_layer", *(str(choice.setup.checkpointed_layers) for choice in choices))
    console.print(table)
    console.print(links_table(model, choices))
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        needed = min(choice.estimate.peak for choice in choices) / (1 - FREE_SHARE)
        print(
            f"nothing fits: the smallest set-up needs {needed / 1e9:.1f} GB a device; take more devices, "
            "shorter sequences or larger devices",
            file=sys.stderr,
        )
        return
    chosen = recommended(fitting, model)
    print(f"recommended ({stage_name(chosen.setup)}): {paste(chosen.setup)}")
    if chosen.setup.offload:
        print('and in deepspeed.json: "zero_optimization": {"offload_optimizer": {"device": "cpu"}}')


def recommended(fitting: list[Choice], model: ModelConfig) -> Choice:
    """The fastest; among set-ups within a twentieth of it the first, which is the simplest."""
    without = [choice for choice in fitting if not choice.setup.offload] or fitting
    top = max(speed(choice.setup, model.n_layers) for choice in without)
    preferred = sorted(without, key=lambda c: {2: 0, 1: 1, 0: 2, 3: 3}[c.setup.zero_stage])
    return next(c for c in preferred if speed(c.setup, model.n_layers) >= 0.95 * top)


def links_table(model: ModelConfig, choices: list[Choice]) -> Table:
    table = Table("sent in a step", *(stage_name(choice.setup) for choice in choices))
    sent = [bytes_sent(model, choice.setup) for choice in choices]
    table.add_row("GB a device", *(f"{value / 1e9:.1f}" for value in sent))
    for link, gigabits in LINKS.items():
        table.add_row(f"seconds at {link}", *(f"{value * 8 / gigabits / 1e9:.2f}" for value in sent))
    return table


def as_json(model: ModelConfig, choices: list[Choice], memory: float) -> dict[str, Any]:
    return {
        "parameters": model.parameter_count(),
        "memory": memory,
        "choices": [
            {
                "zero_stage": choice.setup.zero_stage,
                "offload": choice.setup.offload,
                "fits": choice.fits,
                "batch_size": choice.setup.batch_size,
                "ckpoint_layer": choice.setup.checkpointed_layers,
                "peak_bytes": choice.estimate.peak,
                "host_bytes": choice.estimate.host,
                "parts": dict(choice.estimate.rows()),
                "bytes_sent": bytes_sent(model, choice.setup),
                "seconds_by_link": {
                    link: bytes_sent(model, choice.setup) * 8 / gigabits / 1e9
                    for link, gigabits in LINKS.items()
                },
            }
            for choice in choices
        ],
    }


if __name__ == "__main__":
    run_command(main)
