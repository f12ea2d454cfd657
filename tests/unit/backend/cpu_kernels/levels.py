"""Tests again in a process whose kernels are compiled for less than the processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aquila.backend.cpu_kernels import native

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Those of an x86 processor without matrix tiles; one that it has not is skipped."""


def run_at_level(level: str, code: str, root: Path, cache: Path) -> None:
    """Runs `code` from the project's root, this folder importable. Skips what processor or compiler lack."""
    if native.library("gemv.cpp") is None or not native.level_fits(level):
        pytest.skip(f"this processor or compiler has no {level}")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "AQUILA_CPU_LEVEL": level}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
