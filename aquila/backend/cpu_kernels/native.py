"""C++ kernels beside this file, compiled once a machine, in seconds, and kept in the user's cache folder."""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
if platform.machine() == "x86_64":
    _FLAGS += ("-mprefer-vector-width=512",)  # gcc's own choice is half, for processors that slow down at 512


FOLDER = Path(__file__).resolve().parent


@lru_cache(maxsize=8)
def library(source: str) -> ctypes.CDLL | None:
    """The compiled source file, a path inside this folder.

    None where there is no compiler, or AQUILA_NATIVE=0 forbids it.
    """
    if os.environ.get("AQUILA_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built(FOLDER / source)))
    except (OSError, subprocess.SubprocessError) as error:
        _report(error)
        return None


@lru_cache(maxsize=1)
def _once() -> None:
    """Remembers that the message was printed."""


def _report(error: Exception) -> None:
    """One line on stderr a process: without compiled kernels torch computes the same, more slowly."""
    if _once.cache_info().currsize:
        return
    _once()
    lines = getattr(error, "stderr", None) or b""
    reason = next((line for line in lines.decode(errors="replace").splitlines() if "error" in line), error)
    print(
        f"warning: the CPU kernels could not be compiled, torch computes the same more slowly: {reason}",
        file=sys.stderr,
    )


def _built(source: Path) -> Path:
    """The compiled library: from the cache, or compiled into it. Raises `OSError`, `SubprocessError`."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), *_FLAGS]
    if os.environ.get("AQUILA_EMULATE_AMX") == "1":
        command.append("-DEMULATED_AMX")
    key = hashlib.sha256()
    # A home may be shared by machines of different processors.
    headers = b"".join(header.read_bytes() for header in sorted(FOLDER.rglob("*.h")))
    for part in (
        source.read_bytes(),
        headers,
        repr(command).encode(),
        platform.machine().encode(),
        _processor(),
    ):
        key.update(part)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aquila"
    path = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    except OSError:  # a home that cannot be written: for this process alone
        folder = Path(tempfile.mkdtemp(prefix="aquila-"))
        path = folder / path.name
        handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run(
            [*command, str(source), "-o", unfinished], check=True, capture_output=True, timeout=120
        )
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _processor() -> bytes:
    """What the processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n")
        return next(line for line in lines if line.startswith((b"flags", b"Features")))
    except (OSError, StopIteration):
        return platform.processor().encode()
