"""CPU: oneDNN products, torch's fused attention, a loss that works in the cache.

Run and tested here on x86-64 with AVX-512 and AMX; nothing in it is bound to them.
"""

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from aquila.backend import common, host, reference
from aquila.backend.cpu_kernels import amx, fused_ops, gemv
from aquila.backend.cpu_kernels import cross_entropy as cross_entropy_kernel
from aquila.backend.cpu_kernels import step_attention as step_attention_kernel
from aquila.backend.cpu_kernels.amx import attention as amx_attention
from aquila.backend.cpu_kernels.amx import linear as amx_linear
from aquila.backend.cpu_kernels.amx import linear_cross_entropy as amx_linear_cross_entropy
from aquila.backend.cpu_kernels.step_layers import StepLayers
from aquila.backend.reference import TRIANGLE_BLOCK

COMMUNICATION = "gloo"
# Compiled blocks gave 4 to 6 % more tokens/s (dim 512, bf16, two cores) for 8 to 40 s of compiling.
COMPILE_BLOCKS = False
LOGITS_BYTES = reference.LOGITS_BYTES
OVERLAP_COMM = host.OVERLAP_COMM
ZERO_KERNELS = host.ZERO_KERNELS
TAKES_PARTS = True
KEPT = host.KEPT
DETERMINISTIC: dict[str, tuple[str, ...]] = {}
# Large tensors in huge pages: torch takes fresh memory for each, and faulting in 200 MB of logits 4096 bytes
# at a time takes as long as the product that fills them. torch reads this at its first tensor.
ENVIRONMENT_DEFAULTS = {"THP_MEM_ALLOC_ENABLE": "1"}
SAVED_IN_SELECTIVE = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aquila.tile_attention.default,
)
OPTIMIZERS = ("torch",)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

attention_kind = common.fused_or_same
step_linear = gemv.linear
prepare_weight = gemv.huge_pages
add_weight_gradient = amx_linear.add
whole_cross_entropy = amx_linear_cross_entropy.cross_entropy
square_sum = fused_ops.square_sum
know_documents = reference.know_documents
placement = reference.placement
prepare_generation = reference.prepare_generation
prepare_layers = StepLayers
profiling = reference.profiling
fp8_support = reference.fp8_support
device_count = host.device_count
device_name = host.device_name
supported_precisions = host.supported_precisions
convert_to_fp8 = reference.convert_to_fp8
adamw = fused_ops.adamw


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    documents: Tensor | None = None,
    start: int = 0,
    block: int = TRIANGLE_BLOCK,
) -> Tensor:
    """As `reference.attention`; "fused" is flash attention on matrix tiles, or torch's."""
    return common.attention(
        q,
        k,
        v,
        kind=kind,
        documents=documents,
        start=start,
        block=block,
        fused=_fused,
        triangle_block=reference.plain_attention,
    )


def _fused(q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None, start: int) -> Tensor:
    if amx_attention.takes(q, k, v):
        return amx_attention.attention(q, k, v, documents, start)
    return common.sdpa(q, k, v, documents=documents, start=start)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`, in one pass."""
    y = fused_ops.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps) if y is None else y


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """As `reference.embedding`; its gradient in one pass, each row rounded once."""
    y = fused_ops.embedding(tokens, weight)
    return reference.embedding(tokens, weight) if y is None else y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.swiglu`, in one pass."""
    y = fused_ops.swiglu(gate, up)
    return reference.swiglu(gate, up) if y is None else y


def swiglu_halves(gate_up: Tensor) -> Tensor:
    """As `reference.swiglu_halves`, in one pass."""
    y = fused_ops.swiglu_halves(gate_up)
    return reference.swiglu_halves(gate_up) if y is None else y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `reference.linear`; a generation step's rows, x (n, K), as `step_linear`.

    A prompt, x (B, S, K), is no step however short: its results are the same in any batch.
    """
    if x.dim() == 2 and not torch.is_grad_enabled():
        return gemv.linear(x, weight)
    return amx_linear.linear(x, weight)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotary`, in one pass."""
    y = fused_ops.rotary(x, cos, sin)
    return reference.rotary(x, cos, sin) if y is None else y


def step_attention(qkv: Tensor, kv: Tensor, rows: reference.StepRows) -> Tensor:
    """As `reference.step_attention`, in one pass over keys and values."""
    y = step_attention_kernel.step_attention(qkv, rows.cos, rows.sin, kv, rows.places)
    return common.step_attention(qkv, kv, rows, rotary) if y is None else y


def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float = 0.0, gradient: bool = True
) -> Tensor:
    """As `reference.cross_entropy_`, each row read from memory once.

    The compiled kernel took 0.06 ms a row of 100008 in bf16 (two cores), blocks of plain torch 0.13.
    """
    losses = cross_entropy_kernel.cross_entropy_(logits, labels, scale, z_loss, gradient)
    return cross_entropy_kernel.blocked(logits, labels, scale, z_loss, gradient) if losses is None else losses


def optimizer_kind(asked: str = "auto") -> str:
    """torch's fused AdamW."""
    return "torch" if asked == "auto" else asked


def optimizer(
    kind: str, params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW as one fused kernel. Raises `UserError` for a kind that this device cannot build."""
    if optimizer_kind(kind) != "torch":
        raise common.refuse_optimizer(kind, OPTIMIZERS)
    return common.torch_adamw(params, lr, betas, eps, weight_decay)


def set_device(local_rank: int) -> torch.device:
    """Every rank of this machine shares its cores and memory: there is nothing to choose."""
    common.set_defaults(ENVIRONMENT_DEFAULTS)
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Tells glibc to keep what was freed, but for the largest blocks, for the next step asks for it again.

    Given back to the system, it is faulted in anew at every step, page by page: a tenth of a step's time.
    Who sets glibc's own variables for it decides.
    """
    _mallopt(32 << 20, 2**31 - 1)


def allocate_compactly() -> None:
    """Gives memory back once it is freed: ZeRO-3 makes and drops weights all the time, between what stays.

    Kept, it leaves holes that no later block fits into: a rank grew with every step, to four times its need.
    """
    _mallopt(1 << 20, 64 << 20)


def _mallopt(mmap_threshold: int, trim_threshold: int) -> None:
    """Bytes from which glibc takes a block from the system, and from which it gives the heap's end back."""
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not told:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)


make_deterministic = partial(common.make_deterministic, DETERMINISTIC)


def memory_gib() -> float:
    """Peak resident memory of this process, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def peak_flops(dtype: torch.dtype) -> float | None:
    """None: a CPU's peak depends on its clock and threads; `benchmarks/` measure it."""
    return None


def synchronize() -> None:
    """Nothing is in flight after a call returns."""


def kernels() -> dict[str, str]:
    """What runs each operation on this device, in words: of bf16, where dtypes differ."""
    row_wise = "compiled, in one pass" if fused_ops.available() else "torch"
    by_rows = "compiled, a row at a time" if cross_entropy_kernel.available() else "blocked, in cache"
    return {
        "attention": "flash on matrix tiles" if amx.available() else "torch SDPA (flash for CPU)",
        "rms_norm": row_wise,
        "rotary": row_wise,
        "swiglu": row_wise,
        "linear": "on matrix tiles" if amx.available() else "torch",
        "cross_entropy": "whole, on matrix tiles" if amx.available() else by_rows,
        "optimizer": "AdamW, " + row_wise,
    }
