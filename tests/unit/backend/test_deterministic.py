"""Protects: `deterministic: true` reaches torch and the device's libraries, and contradictions are told."""

import os

import pytest
import torch
from torch._inductor import config

from aquila.backend import cpu, cuda, npu
from aquila.core.errors import UserError

WANTED = {
    cpu: {},
    cuda: {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    npu: {"HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1"},
}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    for variables in WANTED.values():
        for name in variables:
            monkeypatch.setenv(name, "x")
            monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    config.deterministic = False


@pytest.mark.parametrize("backend", WANTED, ids=lambda b: b.__name__.rpartition(".")[2])
def test_every_backend_asks_its_libraries(backend, monkeypatch):
    backend.make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert config.deterministic
    assert {name: os.environ[name] for name in WANTED[backend]} == WANTED[backend]


def test_what_will_do_stays_and_a_contradiction_is_told(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    cuda.make_deterministic()
    monkeypatch.setenv("HCCL_DETERMINISTIC", "false")
    with pytest.raises(UserError, match="HCCL_DETERMINISTIC=false in the environment is not; unset it"):
        npu.make_deterministic()
