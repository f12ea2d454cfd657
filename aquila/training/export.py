"""Copies of checkpoints for other tools, made beside the training and checked by their logits."""

import shutil
from pathlib import Path

from aquila.training.checkpoint_worker import CheckpointWorker
from aquila.training.console import say


class Exporter(CheckpointWorker):
    """Converts every `every`-th finished checkpoint to `exports/step-N-hf`."""

    NAME, DONE = "export", "exported"

    def __init__(self, run_dir: Path, every: int) -> None:
        super().__init__(run_dir / "exports", run_dir / "logs" / "export.log")
        self._every, self._saves = every, 0

    def _wants(self, checkpoint: Path) -> bool:
        self._saves += 1
        return self._saves % self._every == 0

    def _work(self, source: Path, name: str) -> None:
        """The copy gets its name once it has been verified."""
        target, partial = self._folder / f"{name}-hf", self._folder / f".{name}-hf.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            command = ["aquila.convert", "--to", "hf", "--verify"]
            status = self._run([*command, "--input", str(source), "--output", str(partial)])
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
