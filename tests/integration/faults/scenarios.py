"""Faults, and whether a run survives them: for the tests at a small size, for scripts/soak.sh at length.

Each scenario starts real ranks, does them harm, starts the same command again as a person would, and
returns an `Outcome`: whether the end was that of the undisturbed run, and how many steps were done twice.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.integration.rank_server import ForkedProcess
from tests.integration.training_runs import children, exact, finish, metrics, start, train, wait_for

STEPS = 30
OPTIONS = (
    f"train_iters={STEPS}", "save_interval=4", "eval_interval=0", "gradient_accumulation_steps=1",
)  # fmt: skip


class Outcome(NamedTuple):
    fault: str
    survived: bool
    steps_lost: int
    note: str


def undisturbed(project: Path) -> list[dict]:
    """The run that nothing happened to, made once."""
    if not (project / "checkpoints_out" / "undisturbed").is_dir():
        status, output = train(project, "undisturbed", *OPTIONS)
        assert status == 0, output
    return exact(metrics(project, "undisturbed"))


def run_again(project: Path, experiment: str, fault: str, reached: int) -> Outcome:
    """The same command once more: it must end as the undisturbed run did."""
    status, output = train(project, experiment, *OPTIONS)
    if status != 0:
        return Outcome(fault, False, 0, output[-2000:])
    resumed = [line for line in output.splitlines() if line.startswith(("resumes at", "starts at"))]
    step = int(resumed[0].split("step ")[1].split()[0])
    same = exact(metrics(project, experiment)) == undisturbed(project)
    leftovers = list((project / "checkpoints_out" / experiment / "0" / "checkpoints").glob(".*.universal"))
    note = f"resumed at {step}" if same else "the losses differ from the undisturbed run's"
    return Outcome(fault, same and not leftovers, max(0, reached - step), note)


def last_step(project: Path, experiment: str) -> int:
    path = project / "checkpoints_out" / experiment / "0" / "metrics.jsonl"
    records = metrics(project, experiment) if path.is_file() else []
    return records[-1]["step"] if records else 0


def killed_at_random(project: Path, experiment: str, dice: random.Random) -> Outcome:
    """`kill -9` of a random rank at a random moment of training."""
    process = start(project, experiment, *OPTIONS)
    goal = dice.randrange(1, STEPS - 1)
    wait_for(
        lambda: process.poll() is not None or last_step(project, experiment) >= goal, process, exits=True
    )
    time.sleep(dice.random() * 0.05)
    reached = _kill(process, dice.choice(children(process.pid) or [0]), signal.SIGKILL, project, experiment)
    return run_again(project, experiment, "kill -9 of a rank", reached)


def killed_while_saving(project: Path, experiment: str, dice: random.Random) -> Outcome:
    """`kill -9` of a rank while a checkpoint is being written."""
    process = start(project, experiment, *OPTIONS)
    folder = project / "checkpoints_out" / experiment / "0" / "checkpoints"
    wanted = f".step-{4 * dice.randrange(1, 6):08d}.partial"
    wait_for(
        lambda: process.poll() is not None or (folder / wanted).exists(), process, exits=True, pause=0.0005
    )
    time.sleep(dice.random() * 0.01)
    reached = _kill(process, dice.choice(children(process.pid) or [0]), signal.SIGKILL, project, experiment)
    return run_again(project, experiment, "kill -9 while saving", reached)


def terminated(project: Path, experiment: str, dice: random.Random, *, while_saving: bool = False) -> Outcome:
    """SIGTERM to all ranks: nothing is lost, for the step is finished and saved, after a save in flight."""
    process = start(project, experiment, *OPTIONS)
    goal = dice.randrange(1, STEPS - 5)
    partial = project / "checkpoints_out" / experiment / "0" / "checkpoints" / ".step-00000004.partial"

    def now() -> bool:
        return partial.exists() if while_saving else last_step(project, experiment) >= goal

    wait_for(lambda: process.poll() is not None or now(), process, exits=True, pause=0.002)
    ranks = children(process.pid)
    for rank in ranks:
        _send(rank, signal.SIGTERM)
    stopped = "exitcode  : 75" in finish(process, 120)
    reached = last_step(project, experiment)
    outcome = run_again(project, experiment, "SIGTERM", reached)
    return outcome._replace(survived=outcome.survived and stopped and outcome.steps_lost == 0)


def damaged(
    project: Path, experiment: str, dice: random.Random, harm: Callable[[Path], None], what: str
) -> Outcome:
    """A file of the newest checkpoint is harmed: the one before is used."""
    if not (project / "checkpoints_out" / experiment).is_dir():
        status, output = train(project, experiment, *OPTIONS, "exit_interval=14")
        assert "exitcode  : 75" in output, (status, output)
    folder = max((project / "checkpoints_out" / experiment / "0" / "checkpoints").glob("step-*"))
    harm(dice.choice(sorted(path for path in folder.rglob("*") if path.is_file())))
    return run_again(project, experiment, what, 14)


def frozen(project: Path, experiment: str, dice: random.Random) -> Outcome:
    """The whole machine stands still for longer than `hang_timeout`, and goes on: nothing has happened."""
    for attempt in itertools.count():
        outcome = _frozen(project, f"{experiment}-{attempt}", dice.randrange(1, 6))
        if outcome is not None:  # a run that ended before it was frozen shows nothing
            return outcome


def _frozen(project: Path, experiment: str, goal: int) -> Outcome | None:
    process = start(project, experiment, *OPTIONS, "hang_timeout=6")
    wait_for(
        lambda: process.poll() is not None or last_step(project, experiment) >= goal,
        process, exits=True, pause=0.002,
    )  # fmt: skip
    ranks = children(process.pid)
    for rank in ranks:
        _send(rank, signal.SIGSTOP)
    stopped = bool(ranks) and all(_is_stopped(rank) for rank in ranks)
    time.sleep(9 if stopped else 0)
    for rank in ranks:
        _send(rank, signal.SIGCONT)
    output = finish(process, 120)
    same = process.returncode == 0 and exact(metrics(project, experiment)) == undisturbed(project)
    return Outcome("frozen and thawed", same, 0, "went on" if same else output[-2000:]) if stopped else None


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def torn_side_files(project: Path, experiment: str, dice: random.Random) -> Outcome:
    """A kill, after which each file beside the checkpoints is empty, cut, or has a torn line at its end."""
    process = start(project, experiment, *OPTIONS)
    wait_for(lambda: last_step(project, experiment) >= dice.randrange(8, STEPS - 1), process, exits=True)
    reached = _kill(process, (children(process.pid) or [0])[0], signal.SIGKILL, project, experiment)
    folder = project / "checkpoints_out" / experiment / "0"
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        data = path.read_bytes()
        if path.name == "metrics.jsonl":  # what stands before the checkpoint is part of the result
            path.write_bytes(data + dice.choice([b'{"step": 9', b"\0" * 512, b"[]\n", b"\xff\xfe\n{}\n"]))
        else:
            path.write_bytes(dice.choice([b"", data[: len(data) // 2], b"\0" * len(data)]))
    return run_again(project, experiment, "torn side files", reached)


def cut_short(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


class SmallDisk:
    """A tmpfs at `folder`, of `size` bytes; Linux, as root."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def read_only(self, on: bool = True) -> None:
        subprocess.run(["mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.folder)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def full_disk(project: Path, experiment: str) -> Outcome:
    """The disk is full from the second save on: the first stays whole, training goes on, the status tells."""
    undisturbed(project)
    run = project / "checkpoints_out" / "undisturbed" / "0"
    one = sum(
        path.stat().st_size for path in max((run / "checkpoints").glob("step-*")).rglob("*") if path.is_file()
    )
    folder = project / "checkpoints_out" / experiment
    disk = SmallDisk(folder, int(one * 1.6) + (1 << 19))
    try:
        status, output = train(project, experiment, *OPTIONS)
        warned = output.count("a checkpoint was not saved")
        went_on = f"step {STEPS}/{STEPS}" in output
        whole = sorted(path.name for path in (folder / "0" / "checkpoints").glob("step-*"))
        survived = status == 1 and went_on and warned >= 5 and whole == ["step-00000004"]
        if not survived:
            return Outcome(
                "full disk", False, 0, f"status {status}, {warned} warnings, {whole}\n{output[-3000:]}"
            )
        kept = project / "checkpoints_out" / f"{experiment}-copied"
        shutil.copytree(folder, kept)
    finally:
        disk.close()
    outcome = run_again(project, kept.name, "full disk", STEPS)
    return outcome._replace(note=f"{warned} warnings, status 1; then {outcome.note}")


def _kill(process: ForkedProcess, rank: int, number: int, project: Path, experiment: str) -> int:
    _send(rank, number)
    finish(process, 120)
    return last_step(project, experiment)


def _send(pid: int, number: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
