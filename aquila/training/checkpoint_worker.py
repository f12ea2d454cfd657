"""Work on finished checkpoints beside the training: one after the other, in processes of their own."""

import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from aquila.training.console import say


class CheckpointWorker(ABC):
    """A line of checkpoints that training does not wait for. On rank 0 alone.

    A checkpoint may be dropped meanwhile: its files are kept, as hard links, until their turn has come.
    folder: where links and results lie. log: what the processes print.
    """

    NAME: str
    """Of the thread."""
    DONE: str
    """What has been done to a checkpoint: exported."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder, self._log = folder, log
        self._line = ThreadPoolExecutor(1, thread_name_prefix=self.NAME)
        self._waiting: list[Future] = []
        for left in folder.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)

    @abstractmethod
    def _wants(self, checkpoint: Path) -> bool:
        """Whether this one's turn is to come; asked once for each."""

    @abstractmethod
    def _work(self, source: Path, name: str) -> None:
        """On links to the files of the checkpoint `name`, which it removes. In a thread of its own."""

    def __call__(self, checkpoint: Path) -> None:
        """A checkpoint has been finished."""
        if not self._wants(checkpoint):
            return
        source = self._folder / f".{checkpoint.name}.source"
        try:
            _link(checkpoint, source)
        except OSError as error:
            say(f"warning: {checkpoint} is not {self.DONE}: {error}")
            return
        self._waiting.append(self._line.submit(self._work, source, checkpoint.name))

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        """Until the line is empty. alive: called every second meanwhile."""
        while wait(self._waiting, timeout=1).not_done:
            alive()
        self._waiting.clear()

    def _run(self, words: Sequence[str], **variables: str) -> int:
        """Status of `python -m` with these words: no rank, one thread, for the cores are training's."""
        self._log.parent.mkdir(exist_ok=True)
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ranks and not key.startswith("TORCHELASTIC")
        }
        with self._log.open("ab") as log:
            return subprocess.run(
                [sys.executable, "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables | kept | {"OMP_NUM_THREADS": "1"},
            ).returncode


def _link(checkpoint: Path, folder: Path) -> None:
    """The model's files of a checkpoint, without the ranks' shares, under a second name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file():
            try:
                os.link(path, folder / path.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, folder / path.name)
