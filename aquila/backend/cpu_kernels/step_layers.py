"""All layers of a generation step as one call (`step_layers.cpp`).

One by one, their calls and the waking of threads took a quarter of a small model's step, in which memory
stood idle.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from aquila.backend.cpu_kernels import gemv, native
from aquila.backend.reference import LayerWeights, StepRows

_NAMES = {
    (torch.bfloat16, torch.bfloat16): "bf16_by_bf16",
    (torch.bfloat16, torch.int8): "bf16_by_int8",
    (torch.float32, torch.int8): "fp32_by_int8",
}


@lru_cache(maxsize=1)
def _kernels() -> dict[tuple[torch.dtype, torch.dtype], ctypes._CFuncPtr]:
    library, kernels = native.library("step_layers.cpp"), {}
    for types, name in _NAMES.items() if library else ():
        kernel = getattr(library, name)
        kernel.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 10 + [ctypes.c_float, ctypes.c_int]
        kernel.restype = None
        kernels[types] = kernel
    return kernels


def available() -> bool:
    """Whether the compiled kernel is there (compiling it at the first call)."""
    return bool(_kernels())


class StepLayers:
    """The layers of a model, whose weights stay where they are as long as this lives."""

    def __init__(self, layers: Sequence[LayerWeights]):
        self.layers = layers
        parts = [part for layer in layers for part in layer[:-1]]  # in the order of the kernel's `Layer`
        norms = {norm.dtype for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)}
        matrices = {w.dtype for layer in layers for w in (layer.qkv, layer.wo, layer.gate_up, layer.w2)}
        alike = len(norms) == len(matrices) == 1 and all(x is None or x.is_contiguous() for x in parts)
        self._dtype = layers[0].attention_norm.dtype
        self._kernel = _kernels().get((self._dtype, *matrices)) if alike else None
        self._addresses = torch.tensor([0 if x is None else x.data_ptr() for x in parts])

    def __call__(self, x: Tensor, kv: Tensor, rows: StepRows) -> Tensor | None:
        """As `reference.step_layers`; None for what the kernel does not take."""
        n, dim = x.shape
        first, size = self.layers[0], kv.shape[-1]
        kv_heads, ffn = kv.shape[2] // 2, first.w2.shape[1]
        if (
            self._kernel is None
            or x.dtype != self._dtype
            or kv.dtype != self._dtype
            or kv.stride()[3:] != (size, 1)
            or not gemv.rows_by_vectors(n, max(dim, ffn), first.w2)
        ):
            return None
        x = x.clone(memory_format=torch.contiguous_format)
        cos, sin = rows.cos.contiguous(), rows.sin.contiguous()
        self._kernel(
            x.data_ptr(), self._addresses.data_ptr(), kv.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            rows.places.data_ptr(), len(self.layers), dim, ffn, kv.stride(0), n, first.wo.shape[1] // size,
            kv_heads, size, kv.stride(1), kv.stride(2), first.eps, torch.get_num_threads(),
        )  # fmt: skip
        return x
