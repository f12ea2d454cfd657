"""Protects: the processor counts as the only device where torch was built for no other, and there alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from aquila.backend import cpu, host
from aquila.launch.device_probe import look_at_devices, probe_devices

CPU_BUILD = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"


@pytest.mark.parametrize(
    ("facts", "plug_in", "only"),
    [
        (CPU_BUILD, False, True),
        (CPU_BUILD, True, False),
        (CPU_BUILD.replace("cuda: Optional[str] = None", "cuda: Optional[str] = '13.0'"), False, False),
        (CPU_BUILD.replace("hip: Optional[str] = None", "hip: Optional[str] = '6.4'"), False, False),
        ("__version__ = 'another form'\n", False, False),
        (None, False, False),
    ],
)
def test_the_only_device(tmp_path: Path, monkeypatch, facts: str | None, plug_in: bool, only: bool):
    if facts is not None:
        (tmp_path / "version.py").write_text(facts)
    specs = {"torch": SimpleNamespace(origin=str(tmp_path / "__init__.py"))}
    if plug_in:
        specs["torch_npu"] = SimpleNamespace(origin="")
    monkeypatch.setattr(host, "find_spec", specs.get)
    assert host.is_only_device() is only


def test_without_torch_nothing_is_known(monkeypatch):
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    assert not host.is_only_device()


def test_looking_gives_what_trying_gives():
    tried, seen = probe_devices(), look_at_devices()
    assert {key: tried[key] for key in seen if key != "memory_free"} == {
        key: value for key, value in seen.items() if key != "memory_free"
    }


def test_the_backend_offers_what_the_host_says():
    names = ("KEPT", "OVERLAP_COMM", "ZERO_KERNELS", "device_count", "device_name", "supported_precisions")
    assert all(getattr(cpu, name) is getattr(host, name) for name in (*names, "fp8_support"))
