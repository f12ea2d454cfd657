"""Continued pretraining, end to end on the CPU: validation sets, steering, exact records."""

import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.training_runs import make_project, metrics, python, train, weights_hash


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
    "skip_steps=[5-3]": "no range of steps",
    "skip_steps=[a]": "no step",
    "skip_steps=7": "valid list",
    "batch_size_schedule={0: 0}": "batch_size_schedule",
    "batch_size_schedule=[4]": "batch_size_schedule",
    "blend_schedule={10: [0.5, x, y]}": "blend_schedule: 10: data_prefix",
    "blend_schedule={-1: x}": "blend_schedule",
    "rewarm_iters=10": "go together",
    "wsd_start=10": "needs lr_decay_style wsd",
    "wsd_start=-1": "wsd_start",
}


def records(project: Path, experiment: str, name: str) -> dict:
    return json.loads((project / "checkpoints_out" / experiment / "0" / name).read_text())


def test_a_steered_run_stops_twice_and_goes_on_exactly(project: Path) -> None:
    """Skipped steps, a batch-size ramp, a change of blend, a re-warm and a cool-down, in one run."""
    first = "data/demo_text_document"
    steering = [
        f"data_prefix={first}", f"blend_schedule={{5: [0.7, {SECOND}, 0.3, {first}]}}",
        "skip_steps=[4, 9-10]",
        "batch_size_schedule={0: 4, 3: 8, 8: 12}", "rewarm_from=6", "rewarm_iters=3", "lr_decay_style=wsd",
        "wsd_start=9", "split=100", "log_interval=6", "warm_up_iters=0",
    ]  # fmt: skip
    status, output = train(project, "steered", *steering)
    assert status == 0, output
    for stop in (4, 4, 4):
        status, output = train(project, "stopped", *steering, f"exit_interval={stop}")
    assert status == 0, output
    whole, parts = metrics(project, "steered"), metrics(project, "stopped")
    keys = ("loss", "grad_norm", "learning_rate", "consumed_samples", "skipped")
    shown = [[{key: record.get(key) for key in ("step", *keys)} for record in run] for run in (whole, parts)]
    by_step = {record["step"]: record for record in shown[1]}
    assert [record for record in shown[0] if by_step.get(record["step"]) != record] == []
    seen = {record["step"]: record for record in whole}
    assert {step for step, record in seen.items() if record.get("skipped")} == {4, 9, 10}
    assert seen[12]["consumed_samples"] == 3 * 4 + 5 * 8 + 4 * 12
    assert seen[8]["learning_rate"] == pytest.approx(1e-3 * 2 / 3)
    assert seen[12]["learning_rate"] == pytest.approx(1e-4)
    order = records(project, "stopped", "data_order.json")
    assert order["segments"] == records(project, "steered", "data_order.json")["segments"]
    assert [segment["start"] for segment in order["segments"]] == [0, 3 * 4 + 2 * 8]
    history = (project / "checkpoints_out" / "stopped" / "0" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [0, 4, 8]
    assert weights_hash(project, "steered", 12) == weights_hash(project, "stopped", 12)
    python(project, "-m", "aquila.report", "steered", "stopped", "--output", "side")
    told = json.loads((project / "side.json").read_text())
    runs = {name.split("/")[0]: summary for name, summary in told["runs"].items()}
    from aquila.data.order import open_order

    with contextlib.chdir(project):
        stream = open_order("checkpoints_out/stopped/0")
        read = [stream.locate(k)[0] for k in range(whole[-1]["consumed_samples"])]
    for run in runs.values():
        assert run["consumed_samples"] == {name: read.count(name) for name in (first, SECOND)}
        assert 0 < run["goodput"] < 1
    assert runs["stopped"]["starts"] == [0, 4, 8]
    assert told["differing"] == {"exit_interval": ["null", "4"]}
    shown = python(project, "-m", "data_tools.show_batch", "checkpoints_out/steered/0", "--step", "6").stdout
    assert "samples 28 to 35" in shown
    assert SECOND in shown


def test_a_longer_context_from_a_checkpoint(project: Path) -> None:
    """The recipe of docs/continued-pretraining.md; and what changes the function does so only when asked."""
    assert train(project, "short", "train_iters=2", "eval_interval=0", "save_interval=1", ranks=1)[0] == 0
    scaling = "{rope_type: yarn, factor: 2, original_max_position_embeddings: 32}"
    python(
        project, "-m", "aquila.convert", "--input", "checkpoints_out/short", "--output",
        "checkpoints_in/long", "--to", "aquila", "--set", "max_seq_len=64",
        "--set", f"rope_scaling={scaling}", "--verify",
    )  # fmt: skip
    longer = ["bmt_pre_load=True", "train_iters=2", "eval_interval=0"]
    status, output = train(project, "long", *longer, ranks=1, model="long")
    assert status == 0, output
    (start,) = (project / "checkpoints_out" / "long" / "0" / "history.jsonl").read_text().splitlines()
    assert json.loads(start)["model_config"]["rope_scaling"]["factor"] == 2
    assert metrics(project, "long")[-1]["consumed_tokens"] == 2 * 4 * 64
    resume = ["resume=checkpoints_out/short/0/checkpoints/step-00000001", "train_iters=2", "eval_interval=0"]
    allowed = ["seq_length=32", "allow_model_changes=[rope_scaling]"]
    status, output = train(project, "other", *resume, *allowed, ranks=1, model="long")
    assert status == 0, output
    assert "the model goes on with rope_scaling None -> {" in output


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tied_embeddings_and_wide_heads_train_and_go_on_exactly(project: Path, stage: int) -> None:
    from tests.integration.training_runs import MODEL

    folder = project / "checkpoints_in" / "tied"
    if not folder.is_dir():
        folder.mkdir()
        for path in (project / "checkpoints_in" / "small").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = {**MODEL, "tied_embeddings": True, "head_dim": 16}
        (folder / "config.json").write_text(json.dumps(config))
    options = ["precision=fp32", "train_iters=3", "eval_interval=0", f"zero_stage={stage}"]
    status, output = train(project, f"tied{stage}", *options, model="tied")
    assert status == 0, output
    for _ in range(2):
        status, output = train(project, f"tied{stage}-parts", *options, "exit_interval=2", model="tied")
    assert status == 0, output
    one, parts = metrics(project, f"tied{stage}"), metrics(project, f"tied{stage}-parts")
    assert [record["loss"] for record in one] == [record["loss"] for record in parts]
    if stage < 3:
        assert weights_hash(project, f"tied{stage}", 3) == weights_hash(project, f"tied{stage}-parts", 3)


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_path_knows_its_samples(project: Path) -> None:
    """Behind a ramp whose earlier steps are logged elsewhere; in the order of the run that it came from."""
    ramp = ["batch_size_schedule={0: 4, 3: 8}", "eval_interval=0", "precision=fp32", "log_interval=100"]
    assert train(project, "before", *ramp, "train_iters=4", ranks=1)[0] == 0
    path = "resume=checkpoints_out/before/0/checkpoints/step-00000004"
    status, output = train(project, "after", *ramp, path, "train_iters=8", ranks=1)
    assert status == 0, output
    words = ["-m", "data_tools.show_batch", "checkpoints_out/after/0", "--step"]
    assert "samples 28 to 35" in python(project, *words, "6").stdout
    with pytest.raises(subprocess.CalledProcessError) as caught:
        python(project, *words, "2")
    assert "went on from step 4 of another one" in caught.value.stderr
    orders = [records(project, name, "data_order.json") for name in ("before", "after")]
    assert orders[0] == orders[1]


@pytest.mark.slow
def test_a_ramp_sees_what_one_batch_of_each_size_would(project: Path) -> None:
    """Step by step the loss and norm of the mean over that step's samples, in one process and in two."""
    options = ["precision=bf16", "train_iters=4", "eval_interval=0"]
    assert train(project, "ramp2", *options, "batch_size=1", "batch_size_schedule={0: 2, 2: 8}")[0] == 0
    wide = ["batch_size=2", "batch_size_schedule={0: 2, 2: 8}"]
    assert train(project, "ramp1", *options, *wide, "zero_stage=1", ranks=1)[0] == 0
    for one, two in zip(metrics(project, "ramp2"), metrics(project, "ramp1"), strict=True):
        assert one["consumed_samples"] == two["consumed_samples"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)
