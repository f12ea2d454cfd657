"""TensorBoard and Weights & Biases get what metrics.jsonl gets."""

import sys
from pathlib import Path

import pytest

from aquila.core.errors import UserError
from aquila.training.metric_writers import TensorBoard, WeightsAndBiases


def test_tensorboard_holds_the_scalars_and_a_resumed_run_replaces_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, losses in ((0, {1: 3.0, 2: 2.0, 3: 1.0}), (1, {2: 2.5})):
        board = TensorBoard(tmp_path, resumed)
        for step, loss in losses.items():
            board.write({"step": step, "loss": loss, "mfu": None})
        board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert {event.step: event.value for event in events.Scalars("loss")} == {1: 3.0, 2: 2.5}


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is optional and not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    board = WeightsAndBiases(tmp_path, "experiment", {"lr": 1e-3})
    board.write({"step": 1, "loss": 2.0, "mfu": None})
    board.close()
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))


def test_without_wandb_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        WeightsAndBiases(tmp_path, "experiment", {})
