"""Copies of checkpoints for other tools, made beside the training and checked by their logits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from aquila.training.console import say


class Exporter:
    """Converts every `every`-th finished checkpoint to `exports/step-N-hf` in a process of its own.

    One at a time: a new one waits for the one before. On rank 0 alone.
    """

    def __init__(self, run_dir: Path, every: int) -> None:
        self._folder = run_dir / "exports"
        self._log = run_dir / "logs" / "export.log"
        self._every = every
        self._saves = 0
        self._process: subprocess.Popen | None = None
        self._target: Path | None = None

    def __call__(self, checkpoint: Path) -> None:
        """A checkpoint has been finished."""
        self._saves += 1
        if self._saves % self._every:
            return
        self.wait()
        self._target = self._folder / f"{checkpoint.name}-hf"
        self._folder.mkdir(exist_ok=True)
        self._log.parent.mkdir(exist_ok=True)
        shutil.rmtree(self._partial, ignore_errors=True)
        command = [sys.executable, "-m", "aquila.convert", "--to", "hf", "--verify"]
        command += ["--input", str(checkpoint), "--output", str(self._partial)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_one_thread()
            )

    @property
    def _partial(self) -> Path:
        assert self._target is not None
        return self._folder / f".{self._target.name}.partial"

    def wait(self) -> None:
        """Ends the export in flight: the copy gets its name once it has been verified."""
        if self._process is None:
            return
        status, self._process = self._process.wait(), None
        if status == 0:
            shutil.rmtree(self._target, ignore_errors=True)
            self._partial.rename(self._target)
            say(f"exported {self._target}, its logits verified")
        else:
            shutil.rmtree(self._partial, ignore_errors=True)
            say(f"warning: {self._target} was not exported (status {status}); see {self._log}")


def _one_thread() -> dict[str, str]:
    """The environment of a process of its own, that is no rank and leaves the cores to training."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ranks and not key.startswith("TORCHELASTIC")
    }
    return kept | {"OMP_NUM_THREADS": "1"}
