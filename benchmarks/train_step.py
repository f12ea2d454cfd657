"""A whole training step side by side with other libraries, in one run: forward, backward, clip, optimizer.

    python benchmarks/train_step.py [--preset cpu|small|gpu-1b|gpu-7b] [--config MODEL/config.json]
                                    [--rounds 5] [--contenders ours transformers-pure ...]

Ours goes through the engine that users run (`aquila/training/deepspeed/engine.py`, DeepSpeed ZeRO-2, a
world of one; torch alone where DeepSpeed is missing, and it says so); ours-fp8 and ours-fp8-rowwise have
the layers in float8 (run key `fp8`). Theirs: transformers' Llama with sdpa, eager and compiled, in fp32,
under bf16 autocast (amp) and in pure bf16; litgpt's and torchtitan's where they are installed (torchtitan's
amp is its trainer's own, FSDP2's mixed precision). Same first weights, same tokens. Pure bf16 keeps no fp32
master weights and does less work for a worse optimizer.

Each contender is a process of its own. In every round each takes a turn, so that a busy moment hits all;
medians over the rounds count, and ratios are medians of each round's ratio. One contender in each round is
the device's own matrix products at the step's shapes. Where memory is short (--one-at-a-time, and the
presets for GPUs) a contender starts, trains its steps and ends before the next. The last line is JSON:
tokens/s, ratios, share of the matmul peak by the FLOP formula (6 (parameters - embedding) + 6 layers dim
sequence a token), peak memory since the start of training, and the processor's seconds a step, which say
most with --threads 1 on a machine that others use, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aquila.config import ModelConfig, load_model_config  # noqa: E402

THEIRS = [
    f"transformers-{precision}{compiled}"
    for compiled in ("", "-compiled")
    for precision in ("fp32", "amp", "pure")
]
LITGPT = ["litgpt-amp", "litgpt-pure"]
LIGER = ["liger-amp", "liger-pure"]
TITAN = ["torchtitan-amp", "torchtitan-pure"]
PRESETS: dict[str, dict] = {
    "cpu": {
        "config": {"dim": 512, "n_layers": 8, "n_heads": 8, "max_seq_len": 1024},
        "device": "cpu", "batch": 2, "seq": 1024, "rounds": 5,
    },
    "small": {  # whether everything runs; its figures mean nothing
        "config": {"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 1000, "max_seq_len": 64},
        "device": "cpu", "batch": 2, "seq": 64, "rounds": 2,
    },
    # Estimates: ours takes 28 GiB, transformers-amp with its logits in fp32 about 45.
    "gpu-1b": {
        "config": {"dim": 2048, "n_layers": 16, "n_heads": 16, "max_seq_len": 2048},
        "device": "cuda", "batch": 4, "seq": 2048, "rounds": 3, "one_at_a_time": True,
        "contenders": ["ours", "ours-fp8", "transformers-amp", "transformers-pure",
                       "transformers-amp-compiled", "transformers-pure-compiled", "litgpt-pure",
                       "litgpt-pure-compiled", "torchtitan-amp-compiled", "torchtitan-pure-compiled"],
    },
    # One device of 141 GB, as aquila.plan proposes: 16 bytes a parameter are 109 GiB, the whole is 116; two
    # samples are 4 chunks of the loss, the most that need no fp32 sum. torchtitan-amp's 16 bytes are tight.
    "gpu-7b": {
        "config": {"dim": 4096, "n_layers": 32, "n_heads": 32, "max_seq_len": 2048},
        "device": "cuda", "batch": 2, "seq": 2048, "rounds": 2, "one_at_a_time": True, "recompute": 0,
        "contenders": ["ours", "ours-fp8", "transformers-pure", "transformers-pure-compiled", "litgpt-pure",
                       "litgpt-pure-compiled", "torchtitan-amp-compiled", "torchtitan-pure-compiled"],
    },
}  # fmt: skip


class Contender:
    """A process that trains when told to."""

    def __init__(self, name: str, settings: dict) -> None:
        self.name, self.error = name, ""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        command = [sys.executable, str(ROOT / "benchmarks" / "step_contenders.py"), name]
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        self.what = self._answer().get("what", "")
        self.first_loss = float("nan")

    def warm_up(self, steps: int) -> None:
        """Compiles what is compiled; the first loss of all contenders should be the same."""
        answer = self.ask(f"step {steps}")
        self.first_loss = answer.get("losses", [float("nan")])[0]
        print(f"{self.name}: {self.what or 'matrix products'} {self.error}", flush=True)

    def ask(self, line: str) -> dict:
        """Its answer; empty when it failed, and then `error` says why."""
        if self.error:
            return {}
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer()

    def _answer(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        self.error = lines[-1] if lines else f"ended with status {status}"
        return {}

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.communicate("end\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="default: %(default)s")
    parser.add_argument("--config", type=Path, help="a config.json, or its folder, instead of the preset's")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), help="instead of the preset's")
    for name in ("batch", "seq", "rounds", "recompute"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    # More than one, for the first finds the caches full of another contender's tensors.
    parser.add_argument(
        "--steps", type=int, default=3, help="in a turn, of which the median counts; default: %(default)s"
    )
    parser.add_argument("--threads", type=int, help="of each contender; default: torch's choice")
    names = ["ours", "ours-fp8", "ours-fp8-rowwise", *THEIRS, *LIGER, *LITGPT, *TITAN]
    parser.add_argument("--contenders", nargs="+", help=f"{', '.join(names)}[-compiled]")
    parser.add_argument("--compile-ours", action="store_true", help="compiled blocks on a CPU, too")
    parser.add_argument("--one-at-a-time", action="store_true", help="never two contenders in memory")
    return parser.parse_args()


def main() -> None:
    options = parse()
    preset = PRESETS[options.preset] | {
        key: value
        for key in ("device", "batch", "seq", "rounds", "recompute", "contenders")
        if (value := getattr(options, key)) is not None
    }
    config = ModelConfig(**preset["config"])
    if options.config:
        config = load_model_config(options.config.parent if options.config.is_file() else options.config)
    settings = {
        "config": config.model_dump(exclude_defaults=True),
        "batch": preset["batch"],
        "seq": min(preset["seq"], config.max_seq_len),
        "recompute": preset.get("recompute", 0),
        "device": preset["device"],
        "threads": options.threads,
        "compile_ours": options.compile_ours,
    }
    names = ["matmul", *preset.get("contenders", ["ours", *THEIRS, *LITGPT, *TITAN])]
    alone = options.one_at_a_time or preset.get("one_at_a_time", False)
    measure = one_at_a_time if alone else in_turns
    contenders, answers = measure(names, settings, preset["rounds"], options.steps)
    flops = config.flops_per_token(settings["seq"])
    result = summary(contenders, answers, settings["batch"] * settings["seq"], flops)
    show(result)
    print(json.dumps({"preset": options.preset, "load": os.getloadavg()[0], **settings, **result}))


def in_turns(names: list[str], settings: dict, rounds: int, steps: int):
    """All at once in memory, one after the other in each round; a step or two to warm up."""
    contenders = {name: Contender(name, settings) for name in names}
    for contender in contenders.values():
        contender.warm_up(2 if "compiled" in contender.name else 1)
    answers: dict[str, list[dict]] = {name: [] for name in names}
    try:
        for _ in range(rounds):
            for name, contender in contenders.items():
                answers[name].append(contender.ask(f"step {steps}"))
    finally:
        for contender in contenders.values():
            contender.end()
    return contenders, answers


def one_at_a_time(names: list[str], settings: dict, rounds: int, steps: int):
    """As `in_turns`, but a contender starts anew for each of its turns of three steps at least."""
    contenders: dict[str, Contender] = {}
    answers: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            contender = contenders[name] = Contender(name, settings)
            contender.warm_up(3)
            answers[name].append(contender.ask(f"step {max(3, steps)}"))
            contender.end()
    return contenders, answers


def summary(contenders: dict[str, Contender], answers: dict[str, list[dict]], tokens: int, flops: float):
    """Tokens/s, ratios and memory of all that ran."""
    products = [answer for answer in answers["matmul"] if answer]
    peak = median(answer["shapes_flops"] for answer in products)
    ran = {name: found for name, found in answers.items() if name != "matmul" and all(found) and found}
    seconds = {name: [median(answer["seconds"]) for answer in found] for name, found in ran.items()}
    rates = {name: tokens / median(times) for name, times in seconds.items()}
    memory = {name: found[-1]["peak_gib"] for name, found in ran.items()}
    result = {
        "contenders": {
            name: {
                "what": contenders[name].what,
                "tokens_per_second": rates[name],
                "best_tokens_per_second": tokens / min(seconds[name]),
                "cpu_seconds_a_step": median(median(answer["cpu_seconds"]) for answer in ran[name]),
                "peak_memory_gib": memory[name],
                "first_loss": contenders[name].first_loss,
                "share_of_matmul_peak": median(
                    flops * tokens / s / p["shapes_flops"]
                    for s, p in zip(seconds[name], products, strict=True)
                ),
            }
            for name in ran
        },
        "failed": {name: c.error for name, c in contenders.items() if c.error},
        "matmul_peak_at_shapes_tflops": peak / 1e12,
        "matmul_peak_large_tflops": median(answer["large_flops"] for answer in products) / 1e12,
        "flops_per_token": flops,
    }
    if "ours" in ran:
        result["ratios"] = {
            name: median(s / o for s, o in zip(seconds[name], seconds["ours"], strict=True))
            for name in ran
            if name != "ours"
        }
        result["memory_ratios"] = {name: memory["ours"] / memory[name] for name in ran if name != "ours"}
        theirs = [seconds[name] for name in ran if name.startswith("transformers")]
        if theirs:
            best = [min(turn) for turn in zip(*theirs, strict=True)]
            result["ratio_to_best_transformers"] = median(
                s / o for s, o in zip(best, seconds["ours"], strict=True)
            )
    return result


def show(result: dict) -> None:
    print(f"\n{'':30} tokens/s  ours is faster by  of matmul peak  peak GiB  ours takes  CPU s a step")
    for name, facts in result["contenders"].items():
        ratio = result.get("ratios", {}).get(name, 1.0)
        share, memory = facts["share_of_matmul_peak"], result.get("memory_ratios", {}).get(name, 1.0)
        print(
            f"{name:30} {facts['tokens_per_second']:8.0f} {ratio:18.2f} {share:14.1%} "
            f"{facts['peak_memory_gib']:10.2f} {memory:11.0%} {facts['cpu_seconds_a_step']:13.2f}"
        )
    for name, error in result["failed"].items():
        print(f"{name:30} did not run: {error}")
    print(
        f"matmul bf16: {result['matmul_peak_at_shapes_tflops']:.2f} TFLOP/s at the step's shapes, "
        f"{result['matmul_peak_large_tflops']:.2f} large"
    )


if __name__ == "__main__":
    main()
