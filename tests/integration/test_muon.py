"""Muon through DeepSpeed: the step of a plain loop, exact across a stop, and what it does not go with."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aquila.config import load_run_config
from aquila.core.errors import UserError
from tests.integration.training_runs import make_project, metrics, train, weights_hash

MUON = ["optimizer=muon", "eval_interval=0", "warm_up_iters=0", "lr_decay_style=constant"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("muon"))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic iteration, in fp64, for the shorter side."""
    x = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def plain_loop(project: Path, steps: int, rate: float, lr: float) -> dict[str, torch.Tensor]:
    """The weights after `steps`, by hand: Nesterov momentum, orthogonalized; AdamW for all else."""
    from aquila.config import load_model_config
    from aquila.data.batches import make_batch
    from aquila.data.indexed import open_corpora
    from aquila.model import AquilaModel

    model = AquilaModel(load_model_config(project / "checkpoints_in" / "small"), seed=2023)
    stream = open_corpora([str(project / "data/demo_text_document")], "80,20", 32, 2023).train
    named = dict(model.named_parameters())
    hidden = {name for name, p in named.items() if name.startswith("layers.") and p.dim() > 1}
    others = [
        {"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0}
        for n, p in named.items()
        if n not in hidden
    ]
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    momenta = {name: torch.zeros_like(named[name]) for name in hidden}
    for step in range(steps):
        batch = make_batch(stream, range(4 * step, 4 * step + 4))
        model.zero_grad()
        model(batch.tokens, batch.labels, batch.loss_mask).backward()
        adam.step()
        with torch.no_grad():
            for name in hidden:
                weight = named[name]
                momenta[name].lerp_(weight.grad, 0.05)
                update = orthogonalized(weight.grad.lerp(momenta[name], 0.95))
                update = update * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
                weight.mul_(1 - rate * 0.1).sub_(rate * update.float())
    return {name: p.detach() for name, p in named.items()}


def test_three_steps_are_those_of_a_plain_loop(project: Path) -> None:
    options = [
        *MUON,
        "precision=fp32",
        "train_iters=3",
        "batch_size=4",
        "gradient_accumulation_steps=1",
        "lr=1e-3",
    ]
    status, output = train(project, "plain", *options, "muon_lr=0.01", "zero_stage=1", ranks=1)
    assert status == 0, output
    assert "optimizer step: deepspeed" in output
    folder = project / "checkpoints_out" / "plain" / "0" / "checkpoints" / "step-00000003"
    ours = load_file(folder / "model.safetensors")
    for name, wanted in plain_loop(project, 3, 0.01, 1e-3).items():
        # The iteration runs in half precision where DeepSpeed finds it: three digits of an update of 0.01.
        assert (ours[name] - wanted).abs().max() < 1e-3, name
        if not name.startswith("layers."):
            assert (ours[name] - wanted).abs().max() < 1e-4, name


@pytest.mark.slow
def test_it_stops_and_goes_on_exactly_on_the_same_ranks(project: Path) -> None:
    options = [*MUON, "precision=bf16", "train_iters=4"]
    assert train(project, "whole", *options)[0] == 0
    for _ in range(2):
        status, output = train(project, "parts", *options, "exit_interval=2")
    assert status == 0, output
    assert [r["loss"] for r in metrics(project, "whole")] == [r["loss"] for r in metrics(project, "parts")]
    assert weights_hash(project, "whole", 4) == weights_hash(project, "parts", 4)
    status, output = train(project, "parts", *options[:-1], "train_iters=6", ranks=1)
    assert status != 0
    assert "Muon's state goes on as it was divided, with world_size 2; this run has 1" in output


WRONG = {
    ("optimizer=muon", "zero_stage=3"): "goes with zero_stage 1 or 2, not 3",
    ("optimizer=muon", "precision=fp16"): "precision bf16 or fp32",
    ("optimizer=muon", "zero_step=blockwise"): "DeepSpeed's own step",
    ("optimizer=muon", "muon_lr=0"): "muon_lr",
    ("optimizer=muon", "muon_momentum=1"): "muon_momentum",
    ("muon_lr=0.1",): r"muon_lr \(command line\) needs optimizer muon, not auto",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_it_does_not_go_with_is_said_before_a_rank_starts(project: Path, words) -> None:
    with pytest.raises(UserError, match=WRONG[words]):
        load_run_config(project / "run.yaml", "small", list(words), root=project)


def test_a_checkpoint_of_the_other_optimizer_is_refused_by_name(tmp_path: Path, project: Path) -> None:
    from aquila.config.compare import check_function

    (tmp_path / "state.json").write_text('{"optimizer": "muon"}')
    effective = load_run_config(project / "run.yaml", "small", [], root=project)
    with pytest.raises(UserError, match="its optimizer state is of optimizer muon, and the run's is auto"):
        check_function(tmp_path, effective)
    (tmp_path / "state.json").write_text('{"optimizer": "muon", "zero_stage": 1, "precision": "bf16"}')
    words = ["optimizer=muon", "precision=bf16"]
    effective = load_run_config(project / "run.yaml", "small", words, root=project)
    with pytest.raises(UserError, match="as it was divided, with zero_stage 1; this run has 2"):
        check_function(tmp_path, effective)
