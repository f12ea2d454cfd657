"""Validation loss of a small model under AdamW and Muon, each at its own best rate of a small sweep.

    python benchmarks/muon_curve.py [--corpus FILE ...] [--steps 300] [--rates ...] [--muon-rates ...]

Each curve is a run of `aquila.pretrain` in a temporary folder, one rank, with the same seed and data. `lr` of
Muon's runs, which is AdamW's of embedding, output and norms, is the best of AdamW's sweep. The corpus is text
or JSON as `make_indexed_dataset` reads it, else the demo corpus, with aquila-tiny's tokenizer; a tenth of its
documents is for validation. Prints each run's last validation loss, and the tokens after which the best
run of either optimizer first has the other's last loss; the last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fp8_curve import command, prepare


def curve(folder: Path, name: str, steps: int, *words: str) -> list[tuple[int, float]]:
    """(tokens, validation loss) of a run, at every tenth of its steps."""
    every = max(1, steps // 20)
    options = [f"train_iters={steps}", f"eval_interval={every}", "eval_iters=100", "split=90,10", *words]
    command(folder, "aquila.pretrain", "run.yaml", "small", name, *options)
    lines = (folder / "checkpoints_out" / name / "0" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["consumed_tokens"], r["valid_loss"]) for r in records if r.get("valid_loss") is not None]


def reached(points: list[tuple[int, float]], loss: float) -> int | None:
    """Tokens after which `loss` is first reached."""
    return next((tokens for tokens, value in points if value <= loss), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", nargs="+", default=[], help="default: the demo corpus")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 4e-3], help="of AdamW")
    parser.add_argument("--muon-rates", nargs="+", type=float, default=[5e-3, 1e-2, 2e-2, 4e-2])
    options = parser.parse_args()
    curves: dict[str, dict[float, list[tuple[int, float]]]] = {"adamw": {}, "muon": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, [str(Path(path).resolve()) for path in options.corpus])
        for rate in options.rates:
            curves["adamw"][rate] = curve(folder, f"adamw-{rate:g}", options.steps, f"lr={rate:g}")
        best = min(curves["adamw"], key=lambda rate: curves["adamw"][rate][-1][1])
        for rate in options.muon_rates:
            words = ("optimizer=muon", f"lr={best:g}", f"muon_lr={rate:g}", "clip_grad=0")
            curves["muon"][rate] = curve(folder, f"muon-{rate:g}", options.steps, *words)
    print("| optimizer | learning rate | last validation loss |\n|---|---|---|")
    for name, runs in curves.items():
        for rate, points in runs.items():
            print(f"| {name} | {rate:g} | {points[-1][1]:.4f} |")
    winners = {name: min(runs.values(), key=lambda points: points[-1][1]) for name, runs in curves.items()}
    for name, other in (("adamw", "muon"), ("muon", "adamw")):
        loss = winners[other][-1][1]
        tokens = reached(winners[name], loss)
        when = f"{tokens:,} tokens" if tokens else "not reached"
        print(f"{name} has {other}'s last loss {loss:.4f} after {when} of {winners[name][-1][0]:,}")
    print(
        json.dumps(
            {name: {f"{rate:g}": points for rate, points in runs.items()} for name, runs in curves.items()}
        )
    )


if __name__ == "__main__":
    main()
