"""How to fit a model onto devices: memory by part, what fits, what it sends; from shapes, in a second.

    python -m aquila.plan MODEL --devices N --memory 64GB [--seq-length S] [--precision bf16]

Prints memory for ZeRO 0 to 3 and offload, the best set-up that fits each, ready to paste, and the
communication time by link speed. Exit status 0 when something fits, else 2.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import replace
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from aquila.config import ModelConfig, find_model_dir, load_model_config
from aquila.core.errors import EXIT_USER_ERROR, UserError, run_command
from aquila.core.paths import ROOT
from aquila.planning.memory import (
    ACCELERATOR_FIXED,
    GIB,
    LARGEST_LOGITS_BYTES,
    Estimate,
    TrainingSetup,
    bytes_sent,
    estimate,
)
from aquila.planning.speed import CHIPS, LINK_SHARE, MATRIX_SHARE, MEMORY_SHARE, StepTime, step_time

UNITS = {"GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6, "G": 10**9}
SOLD = {"80GB": 85.5e9, "141GB": 150.7e9}
"""What devices sold under these sizes have, by nvidia-smi: 81,559 MiB (H100), 143,771 MiB (H200)."""
LINKS = {"25 Gbit/s": 25, "100 Gbit/s": 100, "200 Gbit/s": 200, "400 Gbit/s": 400, "200 GB/s": 1600}
"""Gbit/s of the slowest link of the ring: Ethernet and InfiniBand between nodes, links within one."""
PER_NODE = 8
FREE_SHARE = 0.06
"""Share of the memory that is left alone: allocators cannot use every gap."""
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
STAGES = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))
HALF_SPEED_TOKENS = 512
"""Micro batches of so many tokens reach about half of a device's speed (a rule of thumb)."""


class Choice(NamedTuple):
    """A set-up with what it takes; `fits` says whether the memory is enough."""

    setup: TrainingSetup
    estimate: Estimate
    fits: bool


def main() -> int:
    arguments = _parse()
    model_dir = find_model_dir(arguments.model, ROOT)
    model = load_model_config(model_dir)
    memory = parse_memory(arguments.memory)
    base = TrainingSetup(
        devices=arguments.devices,
        batch_size=1,
        seq_length=arguments.seq_length or model.max_seq_len,
        precision=arguments.precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        attention="fused" if arguments.attention == "auto" else arguments.attention,
        bucket=arguments.bucket,
        hpz=arguments.hpz,
        sequence_parallel=arguments.sequence_parallel,
        fixed=ACCELERATOR_FIXED,
        logits_bytes=LARGEST_LOGITS_BYTES,  # the largest of any device's
    )
    if problem := model.why_not_shared(base.sequence_parallel, base.seq_length):
        raise UserError(f"--sequence-parallel {base.sequence_parallel} {problem}")
    if base.devices % base.sequence_parallel:
        raise UserError(
            f"--sequence-parallel {base.sequence_parallel} does not divide {base.devices} devices"
        )
    if base.seq_length > model.max_seq_len:
        raise UserError(f"--seq-length {base.seq_length} is longer than max_seq_len {model.max_seq_len}")
    choices = best_of_stages(model, base, memory)
    if arguments.json:
        told = as_json(model, choices, memory)
        if arguments.chip:
            for choice, found in zip(choices, told["choices"], strict=True):
                found["step_seconds"] = _step_time(model, choice, arguments.chip, arguments.link).total
        print(json.dumps(told, indent=1))
    else:
        show(arguments.model, model, choices, memory)
        if arguments.chip:
            print(predicted(model, choices, arguments.chip, arguments.link))
    return 0 if any(choice.fits for choice in choices) else EXIT_USER_ERROR


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m aquila.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a folder under checkpoints_in/, or a path: only config.json is read")
    parser.add_argument("--devices", type=positive, required=True, help="devices of all nodes together")
    parser.add_argument("--memory", required=True, help="of one device: 64GB, 80GiB")
    parser.add_argument("--seq-length", type=positive, help="default: the model's max_seq_len")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--gradient-accumulation-steps", type=positive, default=1)
    parser.add_argument(
        "--attention", choices=("auto", "fused", "triangle", "reference"), default="auto",
        help="auto: fused",
    )  # fmt: skip
    parser.add_argument("--chip", choices=sorted(CHIPS), help="predicts the time of a step on such devices")
    parser.add_argument("--link", type=positive, help="GB/s of the slowest link; default: within one node")
    parser.add_argument(
        "--bucket", type=float, default=1e8, help="reduce_bucket_size of deepspeed.json (default 1e8)"
    )
    parser.add_argument(
        "--hpz", type=positive, default=1, help="zero_hpz_partition_size of ZeRO-3: the devices of a node"
    )
    parser.add_argument(
        "--sequence-parallel", type=positive, default=1, help="neighbouring devices that share each sample"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def parse_memory(text: str) -> float:
    """'64GB' (10^9) or '80GiB' (2^30) to bytes; '80GB' and '141GB' to what such devices have.

    Raises `UserError`.
    """
    if (sold := text.strip().upper().replace(" ", "")) in SOLD:
        return SOLD[sold]
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"--memory {text}: write a number and its unit, such as 64GB or 80GiB")
    return float(match[1]) * UNITS[match[2].upper()]


def best_of_stages(model: ModelConfig, base: TrainingSetup, memory: float) -> list[Choice]:
    return [best(model, replace(base, zero_stage=s, offload=o), memory) for s, o in STAGES]


def enough_devices(model: ModelConfig, base: TrainingSetup, memory: float) -> int | None:
    """The least power of two of devices on which something fits, None when their number is no help."""
    for count in (2**power for power in range(15)):
        if count > base.devices and any(
            choice.fits for choice in best_of_stages(model, replace(base, devices=count), memory)
        ):
            return count
    return None


def best(model: ModelConfig, base: TrainingSetup, memory: float) -> Choice:
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


def speed(setup: TrainingSetup, layers: int) -> float:
    """What to compare set-ups by: larger micro batches fill the device, recomputation adds a third."""
    full = setup.tokens / (setup.tokens + HALF_SPEED_TOKENS)
    return full / (1 + setup.checkpointed_layers / layers / 3)


def stage_name(setup: TrainingSetup) -> str:
    return f"ZeRO-{setup.zero_stage}" + (" + offload" if setup.offload else "")


def paste(setup: TrainingSetup) -> str:
    """The set-up as words for a launch script."""
    words = {
        "batch_size": setup.batch_size,
        "ckpoint_layer": setup.checkpointed_layers,
        "zero_stage": setup.zero_stage,
    }
    if setup.sequence_parallel > 1:
        words["sequence_parallel"] = setup.sequence_parallel
    return " ".join(f"{key}={value}" for key, value in words.items())


def show(name: str, model: ModelConfig, choices: list[Choice], memory: float) -> None:
    base = choices[0].setup
    known_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(highlight=False, width=None if known_width else 100)
    print(
        f"{name}: {model.parameter_count():,} parameters, sequence {base.seq_length}"
        f"{f' on {base.sequence_parallel} devices' * (base.sequence_parallel > 1)}, {base.precision}, "
        f"{base.devices} device(s) of {memory / 1e9:.1f} GB ({memory / GIB:.1f} GiB)"
    )
    table = stage_table("GiB a device", choices)
    columns = [choice.estimate.rows() for choice in choices]
    for row in zip(*columns, strict=True):
        table.add_row(row[0][0], *(f"{value / GIB:.2f}" for _, value in row))
    table.add_section()
    table.add_row("peak", *(f"{choice.estimate.peak / GIB:.1f}" for choice in choices))
    table.add_row("at", *(choice.estimate.fullest for choice in choices))
    table.add_row("on the host", *(f"{choice.estimate.host / GIB:.1f}" for choice in choices))
    table.add_row("and in a save", *(f"{choice.estimate.snapshot / GIB:.1f}" for choice in choices))
    table.add_row("fits", *("yes" if choice.fits else "no" for choice in choices))
    table.add_row("batch_size", *(str(choice.setup.batch_size) for choice in choices))
    table.add_row("ckpoint_layer", *(str(choice.setup.checkpointed_layers) for choice in choices))
    console.print(table)
    console.print(links_table(model, choices))
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        print(nothing_fits(model, choices, memory), file=sys.stderr)
        return
    chosen = recommended(fitting, model)
    print(f"recommended ({stage_name(chosen.setup)}): {paste(chosen.setup)}")
    if chosen.setup.offload:
        print('and in deepspeed.json: "zero_optimization": {"offload_optimizer": {"device": "cpu"}}')
    node = min(PER_NODE, chosen.setup.devices)
    host = node * (chosen.estimate.host + chosen.estimate.snapshot)
    print(
        f"host memory of a node of {node} devices: {host / GIB:.0f} GiB, of which a background save's copy "
        f"takes {node * chosen.estimate.snapshot / GIB:.0f} GiB (background_save=False takes none)"
    )


def nothing_fits(model: ModelConfig, choices: list[Choice], memory: float) -> str:
    smallest = min(choices, key=lambda choice: choice.estimate.peak)
    needed = smallest.estimate.peak / (1 - FREE_SHARE) / 1e9
    count = enough_devices(model, choices[0].setup, memory)
    more = f"take {count} devices" if count else "more devices alone are no help: take larger ones"
    return (
        f"nothing fits: the smallest set-up ({stage_name(smallest.setup)}) needs {needed:.1f} GB a device; "
        f"{more}, or shorter sequences (--seq-length)"
    )


def _step_time(model: ModelConfig, choice: Choice, chip: str, link: int | None) -> StepTime:
    return step_time(model, choice.setup, CHIPS[chip], link=link * 1e9 if link else None)


def predicted(model: ModelConfig, choices: list[Choice], chip: str, link: int | None) -> str:
    """The time of a step of the recommended set-up, by part, with what it assumes."""
    fitting = [choice for choice in choices if choice.fits and not choice.setup.offload]
    if not fitting:
        return "no step time: nothing fits without offload, which is not predicted"
    choice = recommended(fitting, model)
    found = _step_time(model, choice, chip, link)
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in vars(found).items())
    tokens = choice.setup.tokens * choice.setup.gradient_accumulation_steps / found.total
    return (
        f"predicted on {chip}: {found.total:.2f} s a step, {tokens:,.0f} tokens/s/device ({parts}); assumes "
        f"{MATRIX_SHARE:.0%} of the peak in products, {MEMORY_SHARE:.0%} of the memory's rate, "
        f"{LINK_SHARE:.0%} of the links', nothing hidden by overlap, no waiting for host or input; fitted to "
        "published rows of 910B3, not measured here"
    )


def stage_table(title: str, choices: list[Choice]) -> Table:
    """A table with a column per stage, narrow enough for a terminal of 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column(title, no_wrap=True)
    for choice in choices:
        table.add_column(stage_name(choice.setup).replace(" + ", "\n+ "), justify="right", width=9)
    return table


def recommended(fitting: list[Choice], model: ModelConfig) -> Choice:
    """The fastest; among set-ups within a twentieth of it the first, which is the simplest.

    ZeRO-0 is there for comparison: `zero_stage` is 1 to 3, and where 0 fits, 1 fits.
    """
    known = [choice for choice in fitting if choice.setup.zero_stage > 0]
    without = [choice for choice in known if not choice.setup.offload] or known
    top = max(speed(choice.setup, model.n_layers) for choice in without)
    preferred = sorted(without, key=lambda c: {2: 0, 1: 1, 3: 2}[c.setup.zero_stage])
    return next(c for c in preferred if speed(c.setup, model.n_layers) >= 0.95 * top)


def links_table(model: ModelConfig, choices: list[Choice]) -> Table:
    table = stage_table("sent in a step", choices)
    sent = [bytes_sent(model, choice.setup) for choice in choices]
    table.add_row("GB a device", *(f"{value / 1e9:.1f}" for value in sent))
    for link, gigabits in LINKS.items():
        table.add_row(f"s at {link}", *(f"{value * 8 / gigabits / 1e9:.2f}" for value in sent))
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
                "host_bytes_in_a_save": choice.estimate.snapshot,
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
