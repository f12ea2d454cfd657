"""A CPU rank keeps what it freed for its next step, unless the user has told glibc otherwise."""

import os
import platform
import subprocess
import sys

import pytest

KEPT = """
import torch
from aquila.backend import cpu
cpu.set_device(0)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
before = resident()
parts = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(8)]
del parts
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator is another")
@pytest.mark.parametrize(("told", "keeps"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept(root, told, keeps):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", KEPT], cwd=root, env=environment | told, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept = int(done.stdout)
    assert kept > 120 if keeps else kept < 40
