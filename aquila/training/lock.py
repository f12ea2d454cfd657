"""One run at a time in a run folder."""

from pathlib import Path
from typing import IO

from aquila.core.errors import UserError
from aquila.core.lock import HeldError, take_lock
from aquila.training.console import say

_held: list[IO[str]] = []
"""Locks last as long as their open files: to the end of this process, however it ends."""


def lock_run(run_dir: Path) -> None:
    """Makes `run_dir` and keeps it locked while this process lives.

    Raises `UserError` naming the holder when another run has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        _held.append(take_lock(run_dir / ".lock", lambda text: say(f"warning: {text}")))
    except HeldError as holder:
        raise UserError(
            f"{run_dir} is in use by {holder}: stop that run, or train under another experiment name"
        ) from None
