"""Attention of a generation step on a CPU (`step_attention.cpp`): one pass over keys and values.

torch's attention of one query over a long cache reads it at a fifth of the memory's bandwidth.
"""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from aquila.backend.cpu_kernels import native

_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def available() -> bool:
    """Whether the compiled kernel is there (compiling it at the first call)."""
    return bool(_kernels())


@lru_cache(maxsize=1)
def _kernels() -> dict[torch.dtype, ctypes._CFuncPtr]:
    library, kernels = native.library("step_attention.cpp"), {}
    for dtype, name in _NAMES.items() if library else ():
        kernel = getattr(library, f"step_attention_{name}")
        kernel.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 6 + [ctypes.c_int]
        kernel.restype = None
        kernels[dtype] = kernel
    return kernels


def step_attention(qkv: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, places: Tensor) -> Tensor | None:
    """As `reference.step_attention`; None for dtypes, layouts and gradients that the kernel does not take."""
    kernel = _kernels().get(qkv.dtype)
    n, _, size = qkv.shape
    dense = qkv.is_contiguous() and kv.stride()[2:] == (size, 1) and kv.dtype == qkv.dtype
    if kernel is None or not dense or torch.is_grad_enabled():
        return None
    kv_heads = kv.shape[1] // 2
    heads = qkv.shape[1] - 2 * kv_heads
    out = qkv.new_empty(n, heads * size)
    cos, sin = cos.contiguous(), sin.contiguous()
    kernel(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), kv.data_ptr(), places.data_ptr(), out.data_ptr(),
        n, heads, kv_heads, size, kv.stride(0), kv.stride(1), torch.get_num_threads(),
    )  # fmt: skip
    return out
