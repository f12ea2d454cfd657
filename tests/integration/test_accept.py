"""The whole acceptance on CPU ranks, where a rank sums wrongly, and the quick one on a simulated NPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aquila.acceptance.collectives import COLLECTIVES, check_collectives
from aquila.acceptance.table import FAIL, PASS, Table
from tests.integration.launch_helpers import ROOT, environment
from tests.npu_simulator import cann

WRONG_SUMS = """
import os, torch.distributed as dist
right = dist.all_reduce
def all_reduce(tensor, *rest, **options):
    done = right(tensor, *rest, **options)
    if os.environ.get("RANK") == "1":
        tensor[7] += 1
    return done
dist.all_reduce = all_reduce
"""


def accept(folder: Path, *words: str, **variables: str) -> tuple[int, dict, str]:
    file = folder / "accept.json"
    done = subprocess.run(
        [sys.executable, "-m", "aquila.accept", "--json", str(file), *words],
        cwd=folder, env={**environment(ROOT), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, json.loads(file.read_text()), done.stdout + done.stderr


def test_a_rank_that_sums_wrongly_is_found(tmp_path: Path, monkeypatch) -> None:
    table = Table(show=lambda line: None)
    check_collectives(table, 2)
    found = {r.name: r.state for r in table.results}
    assert set(found.values()) == {PASS}
    assert set(COLLECTIVES) < set(found)
    (tmp_path / "sitecustomize.py").write_text(WRONG_SUMS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    table = Table(show=lambda line: None)
    check_collectives(table, 2)
    wrong = {r.name: r for r in table.results if r.state == FAIL}
    assert list(wrong) == ["all_reduce"]
    assert wrong["all_reduce"].detail == "wrong on rank 1"


@pytest.mark.slow
def test_the_whole_of_it_on_cpu_ranks(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    tiny = str(ROOT / "checkpoints_in" / "aquila-tiny")
    status, found, said = accept(tmp_path, "--hostfile", "hostfile")
    assert status == 0, said
    states = {r["state"] for r in found["results"]}
    assert "FAIL" not in states
    stages = {r["stage"] for r in found["results"]}
    assert stages == {
        "machine", "operators", "attention", "optimizer", "model", "generation", "collectives", "training",
        "hosts", "speed",
    }  # fmt: skip
    assert found["paragraph"] in said
    wrong = subprocess.run(
        [sys.executable, "-m", "aquila.accept", "--weights", f"{tiny}/absent"],
        cwd=tmp_path, env={**environment(ROOT), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 2


@pytest.mark.slow
def test_quick_on_a_simulated_npu(tmp_path: Path) -> None:
    if lack := cann.missing():
        pytest.skip(lack)
    variables = cann.build(tmp_path / "npu", npus=2)
    path = f"{ROOT}:{variables.pop('PYTHONPATH')}"
    status, found, said = accept(tmp_path, "--quick", **{**variables, "PYTHONPATH": path})
    assert status == 0, said
    assert "2 x Ascend910B3" in found["machine"]["device"]
