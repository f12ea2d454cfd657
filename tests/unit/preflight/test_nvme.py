"""What offload to files needs of a node is told before the start."""

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from aquila.core.errors import UserError
from aquila.launch.device_probe import probe_async_io
from aquila.preflight import nvme
from aquila.preflight.nvme import check_nvme, nvme_folders


@pytest.fixture
def with_library(monkeypatch):
    monkeypatch.setattr(nvme, "probe_async_io", lambda: True)


def config(zero: dict) -> SimpleNamespace:
    model = SimpleNamespace(parameter_count=lambda: 1000)
    run = SimpleNamespace(precision="bf16")
    return SimpleNamespace(deepspeed={"zero_optimization": zero}, run=run, model=model)


def test_bytes_of_a_node():
    disk = {"device": "nvme", "nvme_path": "/fast"}
    both = config({"offload_optimizer": disk, "offload_param": disk})
    assert nvme_folders(both, devices=16, slots=8) == {Path("/fast"): 9000}
    assert nvme_folders(config({"offload_optimizer": disk}), 8, 8) == {Path("/fast"): 16000}
    assert nvme_folders(config({"offload_optimizer": {"device": "cpu"}}), 8, 8) == {}


def test_a_folder_that_takes_it(tmp_path, with_library):
    assert "room for 0.0 GB" in check_nvme({tmp_path: 1000})


def test_a_folder_that_is_not_there(tmp_path, with_library):
    with pytest.raises(UserError, match="is no folder on this node"):
        check_nvme({tmp_path / "none": 1000})


def test_too_little_room(tmp_path, with_library, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(nvme.shutil, "disk_usage", lambda _: usage(10, 0, 5e9))
    with pytest.raises(UserError, match=r"5\.0 GB free, 7\.0 GB needed"):
        check_nvme({tmp_path: 7e9})


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(nvme, "probe_async_io", lambda: False)
    with pytest.raises(UserError, match="libaio-dev"):
        check_nvme({tmp_path: 1})


@pytest.mark.slow
def test_deepspeed_is_asked():
    assert probe_async_io() in (True, False)
