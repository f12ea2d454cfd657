"""What is not the step itself: waiting for data, logging, imports, starting, and a second rank.

    python benchmarks/overheads.py [--steps 20] [--rounds 1]

Runs `aquila-tiny` on a demo corpus in a temporary folder with the commands that users run. Waiting and
logging are timed inside a process of one rank, around the very calls that the trainer makes, and given as
shares of its step. One rank on one core and two ranks on two take turns. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CONFIG, MODEL = ROOT / "configs" / "Aquila-tiny.yaml", ROOT / "checkpoints_in" / "aquila-tiny"
DATA = "data/demo_text_document"

INSIDE = """
import json, sys, time
from aquila import pretrain
from aquila.data.batches import Batches
from aquila.training.deepspeed.engine import Engine
from aquila.training.metrics import RunLog
spent = {"data": 0.0, "step": 0.0, "log": 0.0}
def timed(cls, method, name):
    original = getattr(cls, method)
    def call(self, *arguments, **options):
        started = time.perf_counter()
        try:
            return original(self, *arguments, **options)
        finally:
            if name != "data" or spent["step"]:  # the first batch waits for its reader to start
                spent[name] += time.perf_counter() - started
    setattr(cls, method, call)
timed(Batches, "__next__", "data")
timed(Engine, "train_step", "step")
timed(RunLog, "step", "log")
status = pretrain.main()
print("@" + json.dumps(spent))
"""


def words(experiment: str, steps: int) -> list[str]:
    run = [str(CONFIG), str(MODEL), experiment, "--version", "v", f"data_prefix={DATA}"]
    return [*run, f"train_iters={steps}", "warm_up_iters=1", "eval_interval=1000000", "log_interval=1"]


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"overheads: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def trained(folder: Path, ranks: int, steps: int, name: str) -> tuple[float, float]:
    """(seconds from the start to the first logged step, tokens/s over all later ones)."""
    metrics = folder / "checkpoints_out" / name / "v" / "metrics.jsonl"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "aquila.pretrain"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command, *words(name, steps)],
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    first = time.perf_counter() - started
    if process.wait():
        raise SystemExit(f"overheads: {ranks} rank(s) ended with status {process.returncode}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
    return first, median(line["tokens_per_second"] for line in lines)


def seconds_of_import() -> float:
    """All that generate.py imports before it reads weights."""
    code = "import generate, aquila.model, aquila.tokenizer, aquila.generation"
    started = time.perf_counter()
    run(ROOT, "-c", code)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="of each run; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="of one and two ranks; default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(folder, "-m", "data_tools.make_demo_corpus", "--output", "demo.jsonl", "--documents", "400")
        run(
            folder, "-m", "data_tools.make_indexed_dataset", "--input", "demo.jsonl",
            "--output-prefix", "data/demo", "--model-dir", str(MODEL),
        )  # fmt: skip
        found = run(folder, "-c", INSIDE, *words("inside", options.steps))
        spent = json.loads(next(line for line in found.splitlines() if line.startswith("@"))[1:])
        speeds: dict[int, list[float]] = {1: [], 2: []}
        starts = []
        for number in range(options.rounds):
            for ranks in speeds:
                first, speed = trained(folder, ranks, options.steps, f"r{ranks}-{number}")
                speeds[ranks].append(speed)
                starts.append(first)
        result = {
            "data_share_of_step": spent["data"] / spent["step"],
            "logging_share_of_step": spent["log"] / spent["step"],
            "launch_to_first_step_seconds": min(starts),
            "generate_import_seconds": min(seconds_of_import() for _ in range(3)),
            "two_ranks_over_one": median(b / a for a, b in zip(speeds[1], speeds[2], strict=True)),
            "load": os.getloadavg()[0],
        }
    for name, value in result.items():
        print(f"{name:32} {value:.4f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
