"""Training as it is: ranks over gloo, ZeRO-2, real data, real checkpoints."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.launch_helpers import environment
from tests.integration.training_runs import (
    children,
    exact,
    finish,
    make_project,
    metrics,
    start,
    train,
    wait_for,
    weights_hash,
)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(project: Path, precision: str) -> None:
    """Losses, norms, evaluations and final weights to the last bit; accumulation, two epochs."""
    whole, parts = f"whole-{precision}", f"parts-{precision}"
    status, output = train(project, whole, f"precision={precision}")
    assert status == 0, output
    status, output = train(project, parts, f"precision={precision}", "exit_interval=7")
    assert status != 0, output
    assert [r["step"] for r in metrics(project, parts)] == [1, 2, 3, 4, 5, 6, 7]
    status, output = train(project, parts, f"precision={precision}", "exit_interval=7")
    assert status == 0, output
    assert "resumes at step 7" in output
    assert exact(metrics(project, parts)) == exact(metrics(project, whole))
    assert metrics(project, whole)[-1]["epoch"] > 0
    assert weights_hash(project, parts, 12) == weights_hash(project, whole, 12)


def test_sigterm_finishes_the_step_saves_and_exits_with_75(project: Path) -> None:
    run = project / "checkpoints_out" / "stopped" / "0"
    process = start(project, "stopped", "train_iters=100000", ranks=1)
    wait_for(lambda: (run / "metrics.jsonl").is_file() and metrics(project, "stopped"), process)
    (rank,) = children(process.pid)
    os.kill(rank, signal.SIGTERM)
    output = finish(process, 120)
    assert "exitcode  : 75" in output
    last = metrics(project, "stopped")[-1]["step"]
    latest = (run / "checkpoints" / "latest").read_text().strip()
    assert int(latest.removeprefix("step-")) >= last


def test_two_ranks_see_what_one_rank_with_twice_the_batch_sees(project: Path) -> None:
    """The same samples in each step, and so the same losses up to the order of sums."""
    assert train(project, "one", "precision=fp32", "batch_size=4", ranks=1)[0] == 0
    two = project / "checkpoints_out" / "whole-fp32"
    if not two.is_dir():
        assert train(project, "whole-fp32", "precision=fp32")[0] == 0
    ours, theirs = metrics(project, "one"), metrics(project, "whole-fp32")
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    assert [r["grad_norm"] for r in ours] == pytest.approx([r["grad_norm"] for r in theirs], rel=1e-3)


def test_micro_steps_under_zero_1_and_2_see_what_one_large_batch_sees(project: Path) -> None:
    """In bf16 with sums in fp32, for which DeepSpeed would take another optimizer under ZeRO-1."""
    halves = ("batch_size=2", "gradient_accumulation_steps=2")
    assert train(project, "once", "batch_size=4", "gradient_accumulation_steps=1")[0] == 0
    for stage in (1, 2):
        status, output = train(project, f"twice-{stage}", *halves, f"zero_stage={stage}")
        assert status == 0, output
        for one, two in zip(metrics(project, "once"), metrics(project, f"twice-{stage}"), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def test_preloading_starts_from_the_very_weights(project: Path) -> None:
    """With a learning rate too small to matter, the checkpoint holds what the model folder held."""
    source = project / "checkpoints_out" / "whole-fp32" / "0" / "checkpoints" / "step-00000012"
    if not source.is_dir():
        assert train(project, "whole-fp32", "precision=fp32")[0] == 0
    loaded = project / "checkpoints_in" / "preloaded"
    shutil.copytree(source, loaded, ignore=shutil.ignore_patterns("deepspeed", "rng"), dirs_exist_ok=True)
    options = ["precision=fp32", "bmt_pre_load=True", "lr=1e-30", "train_iters=1", "weight_decay=0"]
    status, output = train(project, "preloaded", *options, model="preloaded")
    assert status == 0, output
    assert (
        weights_hash(project, "preloaded", 1)
        == hashlib.sha256((loaded / "model.safetensors").read_bytes()).hexdigest()
    )


def test_training_from_the_originals_golden_weights(project: Path, shared_dir: Path) -> None:
    """The first loss is that of the original's weights on the first batch, computed apart."""
    nano = project / "checkpoints_in" / "nano"
    shutil.copytree(shared_dir / "data" / "golden" / "aquila-nano", nano, copy_function=shutil.copyfile)
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(project / "data" / "nano.bin"), dtype=np.int32)
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        builder.add_document(torch.randint(0, 1000, (100,), generator=generator), [100])
    builder.finalize(str(project / "data" / "nano.idx"))
    options = ["bmt_pre_load=True", "precision=fp32", "data_prefix=data/nano", "train_iters=1", "split=100"]
    status, output = train(project, "nano", *options, "gradient_accumulation_steps=1", ranks=1, model="nano")
    assert status == 0, output
    from aquila.data.batches import make_batch
    from aquila.data.indexed import open_corpora
    from aquila.model import AquilaModel

    corpora = open_corpora([str(project / "data" / "nano")], "100", 128, 2023, None)
    batch = make_batch(corpora.train, range(2))
    with torch.no_grad():
        logits = AquilaModel.from_pretrained(nano, attention="reference")(batch.tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).item()
    assert metrics(project, "nano")[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_old_checkpoints_go_marked_ones_stay_and_copies_are_verified(project: Path) -> None:
    """Saves at 2, 4, 6 and the end: the newest stays, and the multiple of 6; every second is exported.

    That of step 4 is dropped while its export has hardly begun.
    """
    options = ["train_iters=7", "save_interval=2", "keep_checkpoints=1", "keep_every=6", "eval_interval=0"]
    status, output = train(project, "kept", *options, "export=hf", "export_every=2", ranks=1)
    assert status == 0, output
    run = project / "checkpoints_out" / "kept" / "0"
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000006", "step-00000007"]
    exports = sorted(path.name for path in (run / "exports").iterdir())
    assert exports == ["step-00000004-hf", "step-00000007-hf"]
    assert output.count("its logits verified") == 2
    from transformers import AutoModelForCausalLM

    from aquila.model import AquilaModel

    tokens = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(3))
    copy = AutoModelForCausalLM.from_pretrained(run / "exports" / "step-00000007-hf", dtype=torch.float32)
    with torch.no_grad():
        ours = AquilaModel.from_pretrained(run / "checkpoints" / "step-00000007")(tokens)
        torch.testing.assert_close(copy(tokens).logits, ours, rtol=1e-4, atol=1e-4)

    # And another run may start from any checkpoint by its path.
    source = run / "checkpoints" / "step-00000006"
    status, output = train(project, "elsewhere", "train_iters=7", f"resume={source}", ranks=1)
    assert status == 0, output
    assert f"resumes at step 6 from {source}" in output
    assert [record["step"] for record in metrics(project, "elsewhere")] == [7]


def test_evaluating_changes_nothing(project: Path) -> None:
    """Every loss, norm and the final weights are those of the run that evaluates."""
    if not (project / "checkpoints_out" / "whole-fp32").is_dir():
        assert train(project, "whole-fp32", "precision=fp32")[0] == 0
    assert train(project, "unevaluated", "precision=fp32", "eval_interval=0", "log_interval=5")[0] == 0
    with_it, without = metrics(project, "whole-fp32"), metrics(project, "unevaluated")
    assert [record["step"] for record in with_it if "valid_loss" in record] == [4, 8, 12]
    assert not any("valid_loss" in record for record in without)
    assert [record["step"] for record in without] == [1, 5, 10, 12]  # the last is logged, due or not
    by_step = {record["step"]: record for record in with_it}
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in without] == [by_step[r["step"]][key] for r in without]
    assert weights_hash(project, "unevaluated", 12) == weights_hash(project, "whole-fp32", 12)


def test_other_data_of_this_model_is_refused_by_the_rank_too(project: Path) -> None:
    """Whoever starts ranks without the launcher gets the same message and status 2."""
    other = "data/other_text_document"
    meta = project / f"{other}.meta.json"
    for suffix in ("bin", "idx", "meta.json"):
        shutil.copy(project / f"data/demo_text_document.{suffix}", project / f"{other}.{suffix}")
    facts = json.loads(meta.read_text())
    facts["tokenizer"]["fingerprint"] = "0" * 64
    meta.write_text(json.dumps(facts))
    done = subprocess.run(
        [sys.executable, "-m", "aquila.pretrain", "run.yaml", "small", "refused", f"data_prefix={other}"],
        cwd=project, env=environment(project), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "another tokenizer" in done.stderr
    assert not (project / "checkpoints_out" / "refused").exists()
