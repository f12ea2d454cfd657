"""Training with float8 layers: ranks over gloo, ZeRO-2, resumed, and read back as a plain model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from aquila.backend import fp8
from aquila.model import AquilaModel
from tests.integration.launch_helpers import environment
from tests.integration.training_runs import exact, make_project, metrics, train, weights_hash

needs_torchao = pytest.mark.skipif(fp8.problem() is not None, reason=str(fp8.problem()))
SHORT = ("train_iters=6", "eval_interval=6")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("fp8"))


@pytest.mark.slow
@needs_torchao
def test_a_run_in_float8_goes_on_exactly_and_leaves_a_plain_model(project: Path) -> None:
    """With a layer recomputed. Its first loss is near bf16's, and not the same."""
    status, output = train(project, "whole", *SHORT, "fp8=tensorwise", "save_interval=4")
    assert status == 0, output
    assert "note: fp8: tensorwise (command line): the layers' matrices multiply in float8" in output
    assert "cpu emulates it" in output
    run = project / "checkpoints_out" / "whole" / "0"
    source = f"resume={run / 'checkpoints' / 'step-00000004'}"
    status, output = train(project, "parts", *SHORT, "fp8=tensorwise", source)
    assert status == 0, output
    assert exact(metrics(project, "parts")) == exact(metrics(project, "whole"))[4:]
    assert weights_hash(project, "parts", 6) == weights_hash(project, "whole", 6)

    status, output = train(project, "plain", "train_iters=1", "eval_interval=0", "batch_size=4", ranks=1)
    assert status == 0, output
    assert "note: fp8" not in output
    loss, plain = (metrics(project, name)[0]["loss"] for name in ("whole", "plain"))
    assert abs(loss - plain) > 1e-5
    assert loss == pytest.approx(plain, rel=1e-2)

    model = AquilaModel.from_pretrained(run, dtype=torch.bfloat16)
    assert not [m for m in model.modules() if isinstance(m, nn.Linear) and "Float8" in type(m).__name__]
    tokens = torch.randint(1000, (2, 32), generator=torch.Generator().manual_seed(3))
    assert model(tokens).isfinite().all()


def test_a_torchao_that_does_not_load_ends_before_anything_is_written(project: Path, tmp_path: Path) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("raise AttributeError('made for another torch')\n")
    (tmp_path / "torchao-0.18.0.dist-info").mkdir()
    (tmp_path / "torchao-0.18.0.dist-info" / "METADATA").write_text("Name: torchao\nVersion: 0.18.0\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(project)])}
    done = subprocess.run(
        [sys.executable, "-m", "aquila.pretrain", "run.yaml", "small", "refused", "fp8=rowwise"],
        cwd=project, env=environment(project) | paths, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "torchao 0.18.0 does not load with this torch (made for another torch)" in done.stderr
    assert not (project / "checkpoints_out" / "refused").exists()
