"""A rank's threads on the cores next to its device: those of the NUMA node that the device is attached to.

Linux tells a PCI device's node and a node's cores in sysfs. Nothing is taken that the process was not given
(taskset, Slurm, a container's cpuset): affinity is narrowed, never moved. Not run beside a device.
"""

import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

SYSFS = Path("/sys")
_BUS = re.compile(r"\|\s*([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])\s*\|", re.IGNORECASE)
_TIMEOUT = 20


def bus_addresses() -> list[str]:
    """PCI addresses of this machine's NPUs in the order of their numbers, by the driver's `npu-smi info`.

    That is not the order of addresses: NPU 0 of a server with eight is at 0000:C1:00.0, NPU 1 at
    0000:01:00.0. Empty where the driver does not answer.
    """
    try:
        done = subprocess.run(
            ["npu-smi", "info"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [found.lower() for found in _BUS.findall(done.stdout)]


def device_number(local_rank: int, visible: str | None) -> int | None:
    """The device of a rank where a variable such as ASCEND_RT_VISIBLE_DEVICES chooses some; None: unknown."""
    if not visible:
        return local_rank
    chosen = visible.split(",")
    if local_rank < len(chosen) and chosen[local_rank].strip().isdigit():
        return int(chosen[local_rank])
    return None


def cores_near(address: str, sysfs: Path = SYSFS) -> tuple[int, set[int]] | None:
    """The NUMA node of a PCI device and its cores; None where the machine has no nodes, or does not tell."""
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
        cores = (sysfs / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):
        return None
    return (node, parse_cores(cores)) if node >= 0 else None


def parse_cores(text: str) -> set[int]:
    """'0-2,8' as {0, 1, 2, 8}."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def written(cores: set[int]) -> str:
    """{0, 1, 2, 8} as '0-2,8'."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def bind_near(address: str, sysfs: Path = SYSFS) -> tuple[bool, str]:
    """Keeps every thread of this process, and those it starts later, on the cores near a PCI device.

    Returns whether they are there now, and a line that says so, or why not.
    """
    near = cores_near(address, sysfs)
    if near is None:
        return False, f"threads: not bound, no NUMA node is known for the device at {address}"
    node, cores = near
    allowed = os.sched_getaffinity(0)
    chosen = cores & allowed
    where = f"NUMA node {node} of the device at {address}"
    if not chosen:
        return False, f"threads: stay on cores {written(allowed)}, none of which is of {where}"
    if chosen != allowed:
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # it may have ended
                os.sched_setaffinity(int(thread), chosen)
    return True, f"threads: cores {written(chosen)}, {where}"
