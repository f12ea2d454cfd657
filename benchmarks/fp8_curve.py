"""The loss of a small model in bf16 and in float8 (run key `fp8`), step by step: same seed, same data.

    python benchmarks/fp8_curve.py [--corpus FILE ...] [--steps 400] [--recipes tensorwise rowwise]

Each curve is a run of `aquila.pretrain` in a temporary folder, one rank, on the machine's own device: a CPU
emulates float8 with the same rounding. fp32 goes along as a yardstick: what bf16 itself rounds. The corpus
is text or JSON as `make_indexed_dataset` reads it, else the demo corpus, with the tokenizer of aquila-tiny.
Prints the loss at a dozen steps, and over the last 50 each curve's mean difference from bf16; the last line
is JSON with all losses.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"dim": 256, "n_layers": 4, "n_heads": 4, "multiple_of": 64, "vocab_size": 1217, "max_seq_len": 256}
RUN = (
    "data_prefix: data/curve_text_document\nbatch_size: 4\nlr: 1.0e-3\nwarm_up: 0.05\nprecision: bf16\n"
    "log_interval: 1\neval_interval: 0\nsave_interval: 1000000\ntensorboard: False\nsplit: '100'\n"
)


def command(folder: Path, *words: str) -> None:
    """`python -m WORDS` there; ends with what it printed when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def prepare(folder: Path, corpus: list[str]) -> None:
    """A model folder, a dataset and a run YAML."""
    model = folder / "checkpoints_in" / "small"
    shutil.copytree(ROOT / "checkpoints_in" / "aquila-tiny", model, ignore=shutil.ignore_patterns("*.bin"))
    (model / "config.json").write_text(json.dumps(MODEL))
    (folder / "run.yaml").write_text(RUN)
    if not corpus:
        command(folder, "data_tools.make_demo_corpus", "--output", "demo.jsonl")
        corpus = ["demo.jsonl"]
    names = ("--output-prefix", "data/curve", "--model-dir", "checkpoints_in/small")
    command(folder, "data_tools.make_indexed_dataset", "--input", *corpus, *names)


def curve(folder: Path, name: str, steps: int) -> list[float]:
    """The loss of every step; `name` is a precision or a recipe."""
    numbers = f"precision={name}" if name in ("bf16", "fp32") else f"fp8={name}"
    command(folder, "aquila.pretrain", "run.yaml", "small", name, numbers, f"train_iters={steps}")
    lines = (folder / "checkpoints_out" / name / "0" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", nargs="+", default=[], help="default: the demo corpus")
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--recipes", nargs="+", default=["tensorwise", "rowwise"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, [str(Path(path).resolve()) for path in options.corpus])
        curves = {name: curve(folder, name, options.steps) for name in ("bf16", *options.recipes, "fp32")}
    print("| step | " + " | ".join(curves) + " |\n|" + "---|" * (len(curves) + 1))
    for step in sorted({1, *(max(1, round(options.steps * part / 11)) for part in range(1, 12))}):
        print(f"| {step} | " + " | ".join(f"{losses[step - 1]:.4f}" for losses in curves.values()) + " |")
    last = {
        name: mean(a - b for a, b in zip(losses[-50:], curves["bf16"][-50:], strict=True))
        for name, losses in curves.items()
    }
    print("| last 50, less bf16 | " + " | ".join(f"{value:+.4f}" for value in last.values()) + " |")
    print(json.dumps({"steps": options.steps, "mean_difference_of_last_50": last, "losses": curves}))


if __name__ == "__main__":
    main()
