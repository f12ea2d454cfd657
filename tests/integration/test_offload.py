"""Optimizer state and parameters offloaded to the host: training, saving, resuming, and without again."""

import json
from pathlib import Path

import pytest
import yaml

from tests.integration.test_large_models import checkpoint, job
from tests.integration.training_runs import RUN, make_project, metrics, run_jobs

pytestmark = pytest.mark.slow

CPU = {"device": "cpu"}
OFFLOADS = {
    "plain": {},
    "optimizer": {"offload_optimizer": CPU},
    "both": {"offload_optimizer": CPU, "offload_param": {"device": "cpu", "pin_memory": True}},
    "parameters": {"offload_param": CPU},
}
RUNS = {  # name: (offload, ranks, stage)
    "two": ("optimizer", 4, 2),
    "three": ("optimizer", 4, 3),
    "both": ("both", 4, 3),
    "parameters": ("parameters", 4, 3),
}
RESUMED = {  # name: (from, offload, ranks, stage)
    "two-again": ("two", "optimizer", 4, 2),
    "both-again": ("both", "both", 4, 3),
    "two-to-both": ("two", "both", 2, 3),
    "both-to-plain": ("both", "plain", 2, 1),
}


def offloaded(name: str, offload: str, ranks: int, stage: int, *more: str) -> dict:
    made = job(ranks, name, f"zero_stage={stage}", "replica_check_interval=1", *more)
    made["args"][0] = f"{offload}.yaml"
    return made


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    project = make_project(tmp_path_factory.mktemp("offload"))
    for name, zero in OFFLOADS.items():
        (project / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
        (project / f"{name}.yaml").write_text(yaml.safe_dump(RUN | {"deepspeed_config": f"{name}.json"}))
    jobs = [job(4, "without", "zero_stage=2")]
    jobs += [offloaded(name, *what, "save_interval=2") for name, what in RUNS.items()]
    jobs += [
        offloaded(name, *what, f"resume={checkpoint(source, 2)}") for name, (source, *what) in RESUMED.items()
    ]
    statuses, printed = run_jobs(project, jobs)
    assert statuses == [[0] * job["ranks"] for job in jobs], printed
    assert "optimizer step: deepspeed (the optimizer is offloaded)" in printed
    return project


@pytest.mark.parametrize("name", [*RUNS, *RESUMED])
def test_losses_are_those_without(project, name) -> None:
    found = [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(project, name)]
    expected = [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(project, "without")]
    assert [step for step, *_ in found] == ([3, 4] if name in RESUMED else [1, 2, 3, 4])
    assert found == [pytest.approx(row, abs=1e-6) for row in expected[-len(found) :]]
