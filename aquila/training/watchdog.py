"""Ends a run that stands still, with the Python stack of every rank and the name of the one that stuck.

Each rank has a thread that is told of every finished step. When none has come for `timeout` seconds it
writes the rank's stacks to its log and a short report beside the other ranks'; after a grace for all
reports each rank names those that do not merely wait for others, and ends itself.

Frozen: nothing. Free: everything; but `_WAITING` and `_READING` name files and functions of this project, so
whoever renames one renames it here. Guarded by: tests/unit/training/test_watchdog.py.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from aquila.core.errors import EXIT_FAILURE
from aquila.core.files import write_atomically
from aquila.training.console import say

_GRACE = 3.0
"""Seconds in which every live rank's report has to arrive."""
_WAITING = (
    "torch/distributed/",
    "deepspeed/comm/",
    "aquila/training/deepspeed/zero_step.py",
    "aquila/training/deepspeed/gradient_exchange.py",
)
"""A stack through these files waits for another rank."""
_READING = ("gather", "synchronize")
"""Or it reads from a device that waits: there the collective itself returns at once."""


def waits_for_others(frames: Sequence[traceback.FrameSummary]) -> bool:
    """Whether a stack merely waits for another rank, in a collective or for a device that is in one."""
    return any(
        any(part in frame.filename for part in _WAITING)
        or (frame.name in _READING and "aquila/" in frame.filename)
        for frame in frames
    )


class Watchdog:
    """Watches one rank from a thread. timeout: seconds, 0 never barks."""

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._beat = time.monotonic()
        self._step = 0
        self._ended = threading.Event()
        self._main = threading.main_thread().ident or 0
        if timeout:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("hang-*.json"):
                old.unlink(missing_ok=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """Something was finished in `step`."""
        self._step = step
        self._beat = time.monotonic()

    def alive(self) -> None:
        """The same step still, but something goes on."""
        self._beat = time.monotonic()

    def close(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        """Barks after `timeout` seconds of silence, counted here: a machine that was frozen counts none."""
        pause = min(1.0, self._timeout / 4)
        silent, beat, looked = 0.0, self._beat, time.monotonic()
        while not self._ended.wait(pause):
            now, before = time.monotonic(), looked
            looked = now
            if self._beat != beat:
                silent, beat = 0.0, self._beat
            silent += min(now - before, 2 * pause)
            if silent > self._timeout:
                self._bark()

    def _bark(self) -> None:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        waits = waits_for_others(frames)
        ours = [frame for frame in frames if f"{os.sep}aquila{os.sep}" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}"
        if ours:
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}, {place}"
        say(f"rank {self._rank} finished nothing in {self._timeout:g} s; its stacks:")
        faulthandler.dump_traceback(all_threads=True)
        report = {"rank": self._rank, "step": self._step, "waits": waits, "place": place}
        try:
            write_atomically(self._folder / f"hang-{self._rank:05d}.json", json.dumps(report))
        except OSError as error:
            say(f"warning: no report of the hang could be written: {error}")
        time.sleep(_GRACE)
        say(self._verdict())
        os._exit(EXIT_FAILURE)  # the main thread cannot be woken, and may hold any lock

    def _verdict(self) -> str:
        reports = {}
        for path in self._folder.glob("hang-*.json"):
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                reports[report["rank"]] = report
            except (OSError, ValueError, KeyError):
                continue
        silent = [rank for rank in range(self._world_size) if rank not in reports]
        stuck = [f"rank {r['rank']} at {r['place']}" for r in reports.values() if not r["waits"]]
        stuck += [f"rank {rank}, which does not even answer" for rank in silent]
        who = "; ".join(stuck) if stuck else "no single rank: all wait for one another"
        return (
            f"error: no step was finished in {self._timeout:g} s (hang_timeout) after step {self._step}. "
            f"Stuck: {who}. The Python stack of every rank is in its log."
        )
