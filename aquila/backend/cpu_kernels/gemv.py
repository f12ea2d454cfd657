"""Products of a few rows with a large matrix on a CPU, at the speed at which memory gives the matrix.

torch's bf16 product of one row reaches half of the memory's bandwidth on small and middling matrices;
`gemv.cpp` reaches nearly all of it. Where there is no compiler, or AQUILA_NATIVE=0, torch computes the
same product.
"""

import ctypes
import platform
from functools import lru_cache

import torch
from torch import Tensor

from aquila.backend import reference
from aquila.backend.cpu_kernels import native

_NAMES = {
    (torch.bfloat16, torch.bfloat16): "bf16_by_bf16",
    (torch.bfloat16, torch.int8): "bf16_by_int8",
    (torch.float32, torch.int8): "fp32_by_int8",
}
_MOST_ROWS = 8
# Without matrix tiles: beyond this size x no longer fits the first cache, and torch's product is faster.
_MOST_X = 32768
_HUGE_PAGE, _ADVISE_HUGE, _ADVISE_COLLAPSE = 2 << 20, 14, 25  # Linux: MADV_HUGEPAGE, MADV_COLLAPSE


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """As `reference.step_linear`."""
    rows, columns = x.shape
    kernel = _kernels().get((x.dtype, weight.dtype))
    if (
        kernel is None
        or not _few(rows, columns, weight)
        or not (x.is_contiguous() and weight.is_contiguous())
    ):
        return reference.step_linear(x, weight, scale)
    out = x.new_empty(rows, weight.shape[0])
    scales = None if scale is None else scale.data_ptr()
    kernel(
        x.data_ptr(), weight.data_ptr(), scales, out.data_ptr(), rows, weight.shape[0], columns,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _few(rows: int, columns: int, weight: Tensor) -> bool:
    tiles = _tile_rows()
    if tiles and weight.shape[0] % 16 == 0 and columns % 32 == 0:
        return rows <= tiles
    return _few_without_tiles(rows, columns, weight)


def rows_by_vectors(rows: int, columns: int, weight: Tensor) -> bool:
    """Whether `linear` would multiply so many rows of so many columns in its kernel without matrix tiles."""
    return not _tile_rows() and _few_without_tiles(rows, columns, weight)


def _few_without_tiles(rows: int, columns: int, weight: Tensor) -> bool:
    return rows <= 2 or (rows <= _MOST_ROWS and (rows * columns <= _MOST_X or weight.dtype == torch.int8))


def available() -> bool:
    """Whether the compiled kernels are there (compiling them at the first call)."""
    return bool(_kernels())


def _library() -> ctypes.CDLL | None:
    return native.library("gemv.cpp")


@lru_cache(maxsize=1)
def _tile_rows() -> int:
    """Rows that the processor's matrix tiles take at once; 0 without tiles."""
    return _library().tile_rows()


@lru_cache(maxsize=1)
def _kernels() -> dict[tuple[torch.dtype, torch.dtype], ctypes._CFuncPtr]:
    library, kernels = _library(), {}
    for types, name in _NAMES.items() if library else ():
        kernel = getattr(library, name)
        kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_int]
        kernel.restype = None
        kernels[types] = kernel
    return kernels


def huge_pages(tensor: Tensor) -> None:
    """Asks the system to hold a tensor in huge pages, without which a stream stops at every 4096 bytes.

    Only advice: where the system does not take it, nothing changes.
    """
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE - start
    if platform.system() != "Linux" or size <= 0:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for advice in (_ADVISE_HUGE, _ADVISE_COLLAPSE):
        madvise(start, size, advice)
