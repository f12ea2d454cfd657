"""Optimizer state between ZeRO stages, numbers of ranks and precisions: runs go on as if nothing were."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from aquila.core.checkpoints import MANIFEST, fingerprint
from tests.integration.test_large_models import checkpoint, job
from tests.integration.training_runs import RUN, make_project, metrics, run_jobs

pytestmark = pytest.mark.slow

ZERO = {1: "zero_stage=1", 2: "zero_stage=2", 3: "zero_stage=3"}
CHANGES = {  # name: (from, ranks, stage, more)
    "2x4-to-3x1": ("2x4", 1, 3, ("replica_check_interval=1",)),
    "3x4-to-2x4": ("3x4", 4, 2, ()),
    "3x4-to-1x2": ("3x4", 2, 1, ("replica_check_interval=1",)),
    "2x4-to-3x2": ("2x4", 2, 3, ()),
    "1x2-to-3x4": ("1x2", 4, 3, ()),
}
PRECISIONS = {
    "bf16-to-fp32-2x4": ("bf16", 4, 2, ("precision=fp32",)),
    "bf16-to-fp32-3x2": ("bf16", 2, 3, ("precision=fp32", "replica_check_interval=1")),
    "bf16-to-bf16-2x4": ("bf16", 4, 2, ("precision=bf16",)),
    "bf16-to-bf16-3x4": ("bf16", 4, 3, ("precision=bf16", "replica_check_interval=1")),
    "fp32-to-bf16-2x4": ("2x4", 4, 2, ("precision=bf16",)),
    "fp32-to-bf16-3x4": ("2x4", 4, 3, ("precision=bf16", "replica_check_interval=1")),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    project = make_project(tmp_path_factory.mktemp("conversion"))
    # Under ZeRO-3 several tensors a group.
    (project / "parts.json").write_text(json.dumps({"zero_optimization": {"sub_group_size": 3000}}))
    (project / "run.yaml").write_text(yaml.safe_dump(RUN | {"deepspeed_config": "parts.json"}))
    sources = [
        job(4, "2x4", ZERO[2], "save_interval=2"),
        job(4, "3x4", ZERO[3], "save_interval=2"),
        job(2, "1x2", ZERO[1], "save_interval=2"),
        job(4, "bf16", ZERO[3], "save_interval=2", "precision=bf16"),
    ]
    changed = [
        job(ranks, name, ZERO[stage], f"resume={checkpoint(source, 2)}", *more)
        for name, (source, ranks, stage, more) in (CHANGES | PRECISIONS).items()
    ]
    statuses, printed = run_jobs(project, sources + changed)
    assert statuses == [[0] * job["ranks"] for job in sources + changed], printed
    assert "anew (world_size 4 -> 2, zero_stage 2 -> 3)" in printed
    return project


def after(project: Path, experiment: str) -> list[tuple[int, float, float]]:
    records = [record for record in metrics(project, experiment) if record["step"] > 2]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


@pytest.mark.parametrize("name", CHANGES)
def test_losses_are_those_of_the_run_that_did_not_change(project, name) -> None:
    expected = after(project, "2x4")
    assert [step for step, *_ in expected] == [3, 4]
    assert after(project, name) == [pytest.approx(row, abs=1e-6) for row in expected]


@pytest.mark.parametrize("change", ["bf16-to-fp32", "bf16-to-bf16", "fp32-to-bf16"])
def test_precisions_change_under_every_stage_alike(project, change) -> None:
    two, three = (after(project, name) for name in sorted(PRECISIONS) if name.startswith(change))
    close = {"abs": 1e-6} if change == "bf16-to-fp32" else {"abs": 2e-3}  # sums of gradients in bf16
    assert [step for step, *_ in two] == [3, 4]
    assert three == [pytest.approx(row, **close) for row in two]


def test_shards_of_other_weights_are_refused_on_every_rank(project) -> None:
    """Moments of a run on weights that are not its own would train, and wrongly."""
    mixed = project / checkpoint("mixed", 2)
    shutil.copytree(project / checkpoint("2x4", 2), mixed)
    shutil.rmtree(mixed / "deepspeed")
    shutil.copytree(project / checkpoint("2x4", 4) / "deepspeed", mixed / "deepspeed")
    files = [path for path in mixed.rglob("*") if path.is_file() and path.name != MANIFEST]
    entries = {str(path.relative_to(mixed)): fingerprint(path) for path in files}
    (mixed / MANIFEST).write_text(json.dumps(entries))
    statuses, printed = run_jobs(project, [job(2, "mixed", ZERO[3])])
    assert statuses == [[2, 2]], printed
    assert "are not those of the weights beside them" in printed
