"""Protects: a rank's threads run next to its device, and never where they were not allowed to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aquila.backend import affinity, npu

SMI = """
| npu-smi 25.2.0                   Version: 25.2.0                                               |
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 0     910B3               | OK            | 95.8        41                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3392 / 65536         |
| 1     910B3               | OK            | 96.7        41                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3384 / 65536         |
"""


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two devices: one at node 1 with this process' last core, one at a node of cores that nobody has."""
    last = max(os.sched_getaffinity(0))
    for address, node in (("0000:c1:00.0", 1), ("0000:01:00.0", 0), ("0000:02:00.0", -1)):
        (tmp_path / "bus/pci/devices" / address).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / address / "numa_node").write_text(f"{node}\n")
    for node, cores in ((0, "5000-5003"), (1, f"{last},6000-6001")):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(f"{cores}\n")
    return tmp_path


def test_devices_by_number_and_not_by_address(tmp_path: Path, monkeypatch) -> None:
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert affinity.bus_addresses() == ["0000:c1:00.0", "0000:01:00.0"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert affinity.bus_addresses() == []


@pytest.mark.parametrize(
    ("rank", "visible", "device"),
    [(3, None, 3), (0, "", 0), (1, "4,6", 6), (2, "4,6", None), (0, "NPU-uuid", None)],
)
def test_visible_devices_choose(rank: int, visible: str | None, device: int | None) -> None:
    assert affinity.device_number(rank, visible) == device


@pytest.mark.parametrize("text", ["", "7", "0-3", "0-3,8,10-11"])
def test_lists_of_cores(text: str) -> None:
    assert affinity.written(affinity.parse_cores(text)) == text


def test_what_sysfs_does_not_know(sysfs: Path) -> None:
    assert affinity.cores_near("0000:02:00.0", sysfs) is None
    assert affinity.cores_near("0000:ff:00.0", sysfs) is None
    bound, line = affinity.bind_near("0000:ff:00.0", sysfs)
    assert not bound
    assert "no NUMA node is known" in line


def test_threads_are_narrowed_to_the_devices_node(sysfs: Path) -> None:
    """In a process of its own: the threads that are there and those that come."""
    code = f"""if True:
    import os, threading
    from pathlib import Path
    from aquila.backend import affinity
    go, seen = threading.Event(), []
    def look():
        go.wait()
        seen.append(os.sched_getaffinity(0))
    early = threading.Thread(target=look)
    early.start()
    before = os.sched_getaffinity(0)
    print(affinity.bind_near("0000:01:00.0", Path({str(sysfs)!r})))
    assert os.sched_getaffinity(0) == before
    print(affinity.bind_near("0000:c1:00.0", Path({str(sysfs)!r})))
    late = threading.Thread(target=look)
    late.start()
    go.set(), early.join(), late.join()
    assert seen == [{{max(before)}}] * 2 == [os.sched_getaffinity(0)] * 2
    """
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    stays, bound = done.stdout.splitlines()
    assert stays.startswith("(False, 'threads: stay on cores")
    assert bound.startswith("(True, 'threads: cores")
    assert bound.endswith("NUMA node 1 of the device at 0000:c1:00.0')")


@pytest.mark.parametrize("asked", [None, "2,npu0:0-1"])
def test_the_users_own_binding_decides(monkeypatch, asked: str | None) -> None:
    """torch_npu binds by CPU_AFFINITY_CONF, evenly and without a look at nodes: not beside ours."""
    bound: list[str] = []
    monkeypatch.setenv("CPU_AFFINITY_CONF", asked or "x")
    if asked is None:
        monkeypatch.delenv("CPU_AFFINITY_CONF")
    monkeypatch.setattr(affinity, "bus_addresses", lambda: ["0000:c1:00.0", "0000:01:00.0"])
    monkeypatch.setattr(affinity, "bind_near", lambda address: bound.append(address) or (True, "bound"))
    line = npu.place_threads(1)
    assert bound == ([] if asked else ["0000:01:00.0"])
    assert line == (f"threads: as CPU_AFFINITY_CONF={asked} says" if asked else "bound")
    assert os.environ["CPU_AFFINITY_CONF"] == (asked or "0")


def test_without_the_drivers_word_torch_npu_binds_evenly(monkeypatch) -> None:
    monkeypatch.setenv("CPU_AFFINITY_CONF", "x")
    monkeypatch.delenv("CPU_AFFINITY_CONF")
    monkeypatch.setattr(affinity, "bus_addresses", lambda: [])
    assert (
        npu.place_threads(0) == "threads: CPU_AFFINITY_CONF=1, for npu-smi does not tell where the device is"
    )
