"""Copies of checkpoints for other tools, made beside the training and checked by their logits."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from aquila.training.console import say


class Exporter:
    """Converts every `every`-th finished checkpoint to `exports/step-N-hf`, one after the other.

    Each in a process of its own, in a line that training does not wait for. The checkpoint may be dropped
    meanwhile: its files are kept, as hard links, until their turn has come. On rank 0 alone.
    """

    def __init__(self, run_dir: Path, every: int) -> None:
        self._folder = run_dir / "exports"
        self._log = run_dir / "logs" / "export.log"
        self._every = every
        self._saves = 0
        self._line = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._waiting: list[Future] = []
        for left in self._folder.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)

    def __call__(self, checkpoint: Path) -> None:
        """A checkpoint has been finished."""
        self._saves += 1
        if self._saves % self._every:
            return
        source = self._folder / f".{checkpoint.name}.source"
        try:
            link_checkpoint(checkpoint, source)
        except OSError as error:
            say(f"warning: {checkpoint} is not exported: {error}")
            return
        self._waiting.append(self._line.submit(self._export, source, f"{checkpoint.name}-hf"))

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        """Until the line is empty. alive: called every second meanwhile."""
        while wait(self._waiting, timeout=1).not_done:
            alive()
        self._waiting.clear()

    def _export(self, source: Path, name: str) -> None:
        """The copy gets its name once it has been verified."""
        target, partial = self._folder / name, self._folder / f".{name}.partial"
        try:
            status = self._convert(source, partial)
            if status == 0:
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                say(f"exported {target}, its logits verified")
            else:
                say(f"warning: {target} was not exported (status {status}); see {self._log}")
        except OSError as error:
            say(f"warning: {target} was not exported: {error}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(source, ignore_errors=True)

    def _convert(self, source: Path, partial: Path) -> int:
        shutil.rmtree(partial, ignore_errors=True)
        self._log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "aquila.convert", "--to", "hf", "--verify"]
        command += ["--input", str(source), "--output", str(partial)]
        with self._log.open("ab") as log:
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=one_thread()
            ).returncode


def link_checkpoint(checkpoint: Path, folder: Path) -> None:
    """The model's files of a checkpoint, without the ranks' shares, under a second name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file():
            try:
                os.link(path, folder / path.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, folder / path.name)


def one_thread() -> dict[str, str]:
    """The environment of a process of its own, that is no rank and leaves the cores to training."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ranks and not key.startswith("TORCHELASTIC")
    }
    return kept | {"OMP_NUM_THREADS": "1"}
