"""Two commits side by side in one run: whose step is slower, by the ratio in each round.

    python benchmarks/compare.py BASE [HEAD] [--preset small] [--rounds 5] [--tolerance 0.05]

Each commit's files are unpacked into a temporary folder (HEAD defaults to the files as they stand here), and
its own `train_step.py` runs, in turns: base, head, base, head. In every turn `ours` is measured against a
yardstick that no commit changes, transformers' step in the same run, so that a busy moment cancels. On a
machine that others use, look at the processor time, with --preset cpu and many rounds: the small preset in
one round was seen to differ from itself by a factor of ten in wall time and a tenth in processor time.
Prints what slowed by more than the tolerance. Exit status: 0, or 1 with --strict when something
slowed. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
HERE = "working tree"


def unpack(commit: str, folder: Path) -> Path:
    """The files of a commit below `folder`; the working tree is used where it is."""
    if commit == HERE:
        return ROOT
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"compare: {archive.stderr.decode().strip()}")
    target = folder / commit.replace("/", "_")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(target, filter="data")
    if not (target / "benchmarks" / "train_step.py").is_file():
        raise SystemExit(f"compare: {commit} has no benchmarks/train_step.py yet")
    return target


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """The last line of one run of that folder's benchmark."""
    command = [sys.executable, "benchmarks/train_step.py", "--preset", options.preset, "--rounds", "1"]
    command += ["--threads", "1", "--steps", str(options.steps), "--contenders", "ours", options.yardstick]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"compare: the benchmark of {folder} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def figures(result: dict, yardstick: str) -> dict[str, float]:
    """What is compared; larger is worse. Step times count in steps of the yardstick."""
    ours, theirs = result["contenders"]["ours"], result["contenders"][yardstick]
    return {
        "step": 1 / result["ratios"][yardstick],
        "processor time": ours["cpu_seconds_a_step"] / theirs["cpu_seconds_a_step"],
        "peak memory": ours["peak_memory_gib"] / theirs["peak_memory_gib"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", default=HERE, help="another; default: the working tree")
    parser.add_argument("--preset", default="small", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="in a turn; default: %(default)s")
    parser.add_argument("--yardstick", default="transformers-pure", help="default: %(default)s")
    parser.add_argument("--tolerance", type=float, default=0.05, help="default: %(default)s")
    parser.add_argument("--strict", action="store_true", help="exit status 1 when something slowed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folders = [unpack(commit, Path(temporary)) for commit in (options.base, options.head)]
        changes: dict[str, list[float]] = {}
        for number in range(options.rounds):
            base, head = (figures(measure(folder, options), options.yardstick) for folder in folders)
            for name in base:
                changes.setdefault(name, []).append(head[name] / base[name] - 1)
            print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:+.1%}" for k, v in changes.items()))
    medians = {name: median(found) for name, found in changes.items()}
    slowed = {name: change for name, change in medians.items() if change > options.tolerance}
    for name, change in medians.items():
        verdict = "worse" if name in slowed else "as before" if change > -options.tolerance else "better"
        print(f"{name}: {change:+.1%} from {options.base} to {options.head}: {verdict}")
    print(json.dumps({"base": options.base, "head": options.head, "changes": medians, "slowed": slowed}))
    return 1 if slowed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
