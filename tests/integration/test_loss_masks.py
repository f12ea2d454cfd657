"""Answers only, and the training loss by corpus: every number of a step recomputed sample by sample."""

import json
from pathlib import Path

import pytest
import torch

from tests.integration.training_runs import make_project, metrics, python, train

TALKS, DEMO = "data/talks_text_document", "data/demo_text_document"
BLEND = f"data_prefix=[0.5, {TALKS}, 0.5, {DEMO}]"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The small project with conversations of which the answers alone count."""
    folder = make_project(tmp_path_factory.mktemp("masks"))
    talks = [
        [
            {"from": "human", "value": f"What follows {n}? " * (n % 2 + 1)},
            {"from": "gpt", "value": f"{n + 1}."},
        ]
        for n in range(200)
    ]
    lines = (json.dumps({"conversations": talk}) + "\n" for talk in talks)
    (folder / "talks.jsonl").write_text("".join(lines))
    done = python(
        folder, "-m", "data_tools.make_indexed_dataset", "--input", "talks.jsonl", "--output-prefix",
        "data/talks", "--model-dir", "checkpoints_in/small", "--mask-prompts",
    )  # fmt: skip
    assert "count in the loss" in done.stdout
    return folder


def recomputed(project: Path, run: str, samples: int) -> tuple[dict[str, list[float]], float]:
    """Of the first samples, first weights: [sum of losses, counted tokens] by corpus; the gradient's norm."""
    from aquila.config import load_model_config
    from aquila.data.indexed import open_corpora
    from aquila.model import AquilaModel

    model = AquilaModel(load_model_config(project / "checkpoints_in" / "small"), seed=2023)
    names = [0.5, str(project / TALKS), 0.5, str(project / DEMO)]
    stream = open_corpora(names, "80,20", 32, 2023).train
    sums: dict[str, list[float]] = {}
    total = torch.zeros(())
    for k in range(samples):
        sample = stream[k]
        row = torch.from_numpy(sample.tokens)
        mask = torch.ones(32) if sample.mask is None else torch.from_numpy(sample.mask[1:]).float()
        losses = torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none") * mask
        entry = sums.setdefault(str(Path(sample.provenance.corpus).relative_to(project)), [0.0, 0.0])
        entry[0] += losses.sum().item()
        entry[1] += mask.sum().item()
        total = total + losses.sum()
    (total / sum(count for _, count in sums.values())).backward()
    return sums, torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


def test_a_step_is_the_mean_over_its_counted_tokens_however_it_is_divided(project: Path) -> None:
    options = ["precision=fp32", BLEND, "train_iters=2", "eval_interval=0"]
    assert train(project, "two", *options)[0] == 0
    status, output = train(project, "one", *options, "batch_size=8", "gradient_accumulation_steps=1", ranks=1)
    assert status == 0, output
    sums, norm = recomputed(project, "two", 8)
    counted = sum(count for _, count in sums.values())
    assert 0 < sums[TALKS][1] < 32 * 4 == sums[DEMO][1]
    for run in ("two", "one"):
        first = metrics(project, run)[0]
        assert first["loss"] == pytest.approx(sum(loss for loss, _ in sums.values()) / counted, rel=1e-5)
        assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert first["counted_tokens"] == {name: count for name, (_, count) in sums.items()}
        for name, (loss, count) in sums.items():
            assert first["train_losses"][name] == pytest.approx(loss / count, rel=1e-5)
    assert metrics(project, "two")[1]["loss"] == pytest.approx(metrics(project, "one")[1]["loss"], rel=1e-4)
    shown = python(
        project, "-m", "data_tools.show_batch", "checkpoints_out/two/0", "--step", "1", "--model-dir",
        "checkpoints_in/small", "--characters", "2000",
    ).stdout  # fmt: skip
    assert "labels count in the loss" in shown
    assert "⟦" in shown
    shown = python(
        project,
        "-m",
        "data_tools.inspect_dataset",
        TALKS,
        "--documents",
        "3",
        "--model-dir",
        "checkpoints_in/small",
    ).stdout
    assert "loss mask:" in shown
    assert "What follows 3? What follows 3? \n⟦4.</s>⟧" in shown


def test_losses_by_corpus_are_those_of_the_steps_since_the_last_line(project: Path) -> None:
    options = [BLEND, "train_iters=6", "eval_interval=0", "precision=fp32"]
    assert train(project, "each", *options, "tensorboard=True", ranks=1)[0] == 0
    assert train(project, "some", *options, "log_interval=3", ranks=1)[0] == 0
    each, some = metrics(project, "each"), metrics(project, "some")
    assert [record["step"] for record in some] == [1, 3, 6]
    for name in (TALKS, DEMO):
        parts = [(r["train_losses"][name], r["counted_tokens"][name]) for r in each[3:]]
        wanted = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
        assert some[2]["train_losses"][name] == pytest.approx(wanted, rel=1e-6)
        assert some[2]["counted_tokens"][name] == sum(count for _, count in parts)
    weighted = sum(each[4]["train_losses"][name] * each[4]["counted_tokens"][name] for name in (TALKS, DEMO))
    assert each[4]["loss"] == pytest.approx(weighted / sum(each[4]["counted_tokens"].values()), rel=1e-6)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(project / "checkpoints_out" / "each" / "0" / "tensorboard"))
    board.Reload()
    assert len(board.Scalars(f"train_losses/{TALKS}")) == 6
