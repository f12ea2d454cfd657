"""A rank for tests of the launcher: no torch, the training program's outer behaviour alone.

    standin_rank.py --version VERSION STEPS STEP_SECONDS EXP [rankN=WHAT ...] [key=value ...]

Rank 0 writes metrics.jsonl. WHAT makes a rank misbehave at step 3: `raise`, `user` (exit status 2), `kill`
(SIGKILL to itself), `hang`. SIGTERM saves a checkpoint and leaves with 75; `slow` takes 4 s for that.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from aquila.core.errors import EXIT_STOPPED, UserError, run_command


def main() -> int:
    _, version, *words = sys.argv[1:]
    steps, seconds, experiment = int(words[0]), float(words[1]), words[2]
    behaviour = dict(word.split("=", 1) for word in words if word.startswith("rank"))
    rank = int(os.environ["RANK"])
    run_dir = Path("checkpoints_out") / experiment / version
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    latest = run_dir / "checkpoints" / "latest"
    first = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} starts after step {first}", flush=True)
    print("arguments", json.dumps(words), flush=True)
    for step in range(first + 1, steps + 1):
        time.sleep(seconds)
        if stop:
            if behaviour.get(f"rank{rank}") == "slow":
                wait(4)
            print("saved", flush=True)
            return save(run_dir, step - 1, rank)
        if step == 3:
            misbehave(behaviour.get(f"rank{rank}"))
        if rank == 0:
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 5 / step, "tokens_per_second": 100.0}) + "\n")
            if step == 2:
                save(run_dir, step, rank)
    return 0


def wait(seconds: float) -> None:
    """Also where signals arrive meanwhile."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(left)


def save(run_dir: Path, step: int, rank: int) -> int:
    if rank == 0:
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (run_dir / "checkpoints" / "latest").write_text(folder.name)
    return EXIT_STOPPED


def misbehave(what: str | None) -> None:
    if what == "raise":
        raise RuntimeError("the loss of this rank went up in smoke")
    if what == "user":
        raise UserError("the data of this rank is wrong")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(3600)


if __name__ == "__main__":
    run_command(main)
