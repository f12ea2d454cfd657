"""How long training stands still for a checkpoint: written in the background against blocking.

    python benchmarks/checkpoint_save.py [--dim 512] [--layers 8] [--vocabulary 20000]

Two runs of 2 ranks each that differ in `background_save` alone and save every fourth step. The last
line is JSON: seconds of stand-still a save (medians; the first save of a process, which also takes its
memory from the system, is left out) and their ratio.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 24, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=20000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments)
        stalls = {mode: run(folder, mode) for mode in (False, True)}
    blocking, background = (statistics.median(stalls[mode]) for mode in (False, True))
    result = {
        "model": vars(arguments),
        "blocking_seconds": round(blocking, 3),
        "background_seconds": round(background, 3),
        "ratio": round(background / blocking, 3),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(result))


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """A model folder of the wanted size and the demo corpus."""
    model = folder / "checkpoints_in" / "model"
    shutil.copytree(ROOT / "checkpoints_in" / "aquila-tiny", model)
    config = {
        "dim": arguments.dim, "n_layers": arguments.layers, "n_heads": 8, "multiple_of": 64,
        "vocab_size": arguments.vocabulary, "max_seq_len": 64,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    python(folder, "-m", "data_tools.make_demo_corpus", "--output", "demo.jsonl", "--documents", "500")
    options = ["--input", "demo.jsonl", "--output-prefix", "demo", "--model-dir", str(model)]
    python(folder, "-m", "data_tools.make_indexed_dataset", *options)


def run(folder: Path, background: bool) -> list[float]:
    """Seconds that each save but the first kept training waiting."""
    mode = "background" if background else "blocking"
    settings = {
        "data_prefix": "demo_text_document", "train_iters": STEPS, "save_interval": EVERY, "log_interval": 1,
        "keep_checkpoints": 1, "background_save": background, "tensorboard": False, "eval_interval": 0,
        "batch_size": 4,
    }  # fmt: skip
    (folder / f"{mode}.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items()))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", "-m", "aquila.pretrain", f"{mode}.yaml", "model", mode]
    python(folder, *launch)
    lines = (folder / "checkpoints_out" / mode / "0" / "metrics.jsonl").read_text().splitlines()
    stalls = [record["save_seconds"] for record in map(json.loads, lines) if "save_seconds" in record]
    print(f"{mode}: {stalls} s", flush=True)
    return stalls[1:]


def python(folder: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])


if __name__ == "__main__":
    main()
