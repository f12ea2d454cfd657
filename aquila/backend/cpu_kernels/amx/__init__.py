"""Kernels on AMX matrix tiles (Intel Xeon since 2023). Without AMX nothing here is called.

With AQUILA_EMULATE_AMX=1 the tiles are emulated in plain C++ (`emulated.h`): slow, for tests on processors
without AMX that have AVX-512 and its bf16 instructions.
"""

import torch

from aquila.backend.cpu_kernels import native

_found: bool | None = None


def available() -> bool:
    """Whether this machine has AMX and a compiler (compiling at the first call)."""
    global _found
    if _found is None and not torch.compiler.is_compiling():  # a tracer could not follow; it finds the answer
        library = native.library("amx/linear.cpp")
        _found = library is not None and bool(library.amx_available())
    return bool(_found)


def forget() -> None:
    """Makes the next call of `available` look again, and compile again where the environment changed."""
    global _found
    _found = None
    native.library.cache_clear()
