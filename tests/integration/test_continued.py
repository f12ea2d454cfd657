"""Continued pretraining, end to end on the CPU: validation sets, steering, exact records."""

import json
from pathlib import Path

import pytest

from tests.integration.training_runs import make_project, metrics, python, train


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The small project with two more corpora."""
    folder = make_project(tmp_path_factory.mktemp("continued"))
    for name, seed in (("second", "7"), ("third", "8")):
        python(
            folder, "-m", "data_tools.make_demo_corpus",
            "--output", f"{name}.jsonl", "--documents", "20", "--seed", seed,
        )  # fmt: skip
        python(
            folder, "-m", "data_tools.make_indexed_dataset", "--input", f"{name}.jsonl",
            "--output-prefix", f"data/{name}", "--model-dir", "checkpoints_in/small",
        )  # fmt: skip
    return folder


SECOND, THIRD = "data/second_text_document", "data/third_text_document"
SETS = f"valid_data={{second: {SECOND}, both: [0.7, {SECOND}, 0.3, {THIRD}]}}"


def plain_loss(project: Path, prefix: str, samples: int) -> tuple[float, float]:
    """Loss and bits per byte of the first weights, recomputed sample after sample."""
    import math

    import torch

    from aquila.config import load_model_config
    from aquila.data.indexed import open_corpora
    from aquila.model import AquilaModel
    from aquila.tokenizer import load_tokenizer

    folder = project / "checkpoints_in" / "small"
    model = AquilaModel(load_model_config(folder), dtype=torch.float32, seed=2023)
    tokenizer = load_tokenizer(folder)
    stream = open_corpora([str(project / prefix)], "100", 32, 0).train
    nats = tokens = size = 0.0
    for k in range(min(samples, stream.samples_per_epoch)):
        row = torch.from_numpy(stream[k].tokens)
        logits = model(row[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
        tokens += len(row) - 1
        special = set(tokenizer.special_tokens.values())
        size += sum(len(tokenizer.token_bytes(t)) for t in row[1:].tolist() if t not in special)
    return nats / tokens, nats / math.log(2) / size


def test_validation_sets_have_their_own_losses_whatever_the_batch(project: Path) -> None:
    options = ["precision=fp32", SETS, "train_iters=2", "eval_interval=100", "eval_at_start=True", "lr=1e-30"]
    status, output = train(project, "sets", *options, "tensorboard=True")
    assert status == 0, output
    status, output = train(
        project, "other", *options, "batch_size=3", "gradient_accumulation_steps=1", ranks=1
    )
    assert status == 0, output
    ours, theirs = metrics(project, "sets"), metrics(project, "other")
    assert [record["step"] for record in ours] == [0, 1, 2]
    assert "loss" not in ours[0]
    for one, two in ((ours[0], theirs[0]), (ours[2], theirs[2]), (ours[0], ours[2])):
        assert one["valid_loss"] == pytest.approx(two["valid_loss"], rel=1e-6)
        assert one["valid_losses"] == pytest.approx(two["valid_losses"], rel=1e-6)
    loss, bits = plain_loss(project, SECOND, 32)
    assert ours[0]["valid_losses"]["second"] == pytest.approx(loss, rel=1e-5)
    assert ours[0]["valid_bits_per_byte"]["second"] == pytest.approx(bits, rel=1e-5)
    assert set(ours[0]["valid_bits_per_byte"]) == {"split", "second", "both"}
    assert "valid_losses" not in ours[1]
    assert "| second " in output
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(project / "checkpoints_out" / "sets" / "0" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("valid_losses/both")] == [0, 2]


def test_wrong_keys_end_before_a_rank_starts(project: Path) -> None:
    from aquila.config import load_run_config
    from aquila.core.errors import UserError

    for override, message in WRONG.items():
        with pytest.raises(UserError, match=message):
            load_run_config(project / "run.yaml", "small", [override], root=project)


WRONG = {
    "valid_data={'a b': x}": "cannot name a set",
    "valid_data={split: x}": "cannot name a set",
    "valid_data={a: [0.5, x, y]}": "valid_data: a: data_prefix",
    "valid_data=x": "valid_data: input should be a valid dictionary",
    "eval_at_start=3": "eval_at_start",
}


def records(project: Path, experiment: str, name: str) -> dict:
    return json.loads((project / "checkpoints_out" / experiment / "0" / name).read_text())
