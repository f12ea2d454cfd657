"""Where metrics go besides the run's own files: TensorBoard, Weights & Biases."""

import os
from pathlib import Path
from typing import Any, Protocol

from aquila.core.errors import UserError


def scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """(name, number) of a record; those of an object within it are `object/name`."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += [(f"{key}/{name}", number) for name, number in scalars(value)]
        elif isinstance(value, int | float) and key != "step":
            found.append((key, value))
    return found


class MetricWriter(Protocol):
    def write(self, record: dict[str, Any]) -> None:
        """One record of metrics.jsonl."""

    def close(self) -> None: ...


class TensorBoard:
    """Scalars in `folder`; a resumed run overwrites the steps that it takes again."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer: Any = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        # One event for all: each on its own would wake the writer's thread a dozen times a step.
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in scalars(record)]
        self._writer.file_writer.add_summary(self._summary(value=values), record["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run in `folder`, offline unless WANDB_MODE says otherwise. Raises `UserError` without wandb."""

    def __init__(self, folder: Path, experiment: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb: true, but wandb is not installed: pip install wandb, or leave it out"
            ) from None
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        self._run = wandb.init(
            dir=str(folder), project="aquila", name=experiment, config=config, resume="allow", id=folder.name
        )

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(dict(scalars(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()
