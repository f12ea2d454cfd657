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

from aquila.core.errors import UserError

_FLAGS = ("-O3", "-fno-math-errno", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
# gcc's own choice of vectors is half as wide, for processors that slow down at 512 bits.
_WIDE = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()

# Levels of instructions below the processor's own: their flags, and what the processor must have.
_LEVELS = {
    "native": (("-march=native", *_WIDE), ()),
    "avx512_bf16": (("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", *_WIDE), ("avx512_bf16",)),
    "avx512": (("-march=x86-64-v4", *_WIDE), ("avx512vl", "avx512bw", "avx512dq")),
    "avx2": (("-march=x86-64-v3",), ("avx2", "fma")),
    "portable": ((), ()),  # the compiler's least for this architecture
    "none": ((), ()),  # nothing compiled: torch alone
}


def level() -> str:
    """AQUILA_CPU_LEVEL: the instructions that kernels are compiled for, by default the processor's own.

    Raises `UserError` for an unknown level, or one that this processor lacks.
    """
    chosen = os.environ.get("AQUILA_CPU_LEVEL") or "native"
    if os.environ.get("AQUILA_NATIVE") == "0":
        return "none"
    if chosen not in _LEVELS:
        raise UserError(f"AQUILA_CPU_LEVEL: '{chosen}' is not one of {', '.join(_LEVELS)}")
    if not level_fits(chosen):
        raise UserError(f"AQUILA_CPU_LEVEL: this processor has no {chosen}; leave the variable unset")
    return chosen


def level_fits(level: str) -> bool:
    """Whether this processor runs what is compiled for a level."""
    return set(_LEVELS[level][1]) <= set(_processor().decode().split())


FOLDER = Path(__file__).resolve().parent


@lru_cache(maxsize=8)
def library(source: str) -> ctypes.CDLL | None:
    """The compiled source file, a path inside this folder.

    None where there is no compiler, or AQUILA_NATIVE=0 (as AQUILA_CPU_LEVEL=none) forbids it.
    """
    if level() == "none":
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
    command = [*shlex.split(os.environ.get("CXX", "g++")), *_FLAGS, *_LEVELS[level()][0]]
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
