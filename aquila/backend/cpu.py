"""CPU: oneDNN products, torch's fused attention, a loss that works in the cache.

Run and tested here on x86-64 with AVX-512 and AMX; nothing in it is bound to them.
"""

import os
import platform
import resource
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from aquila.backend import common, few_rows, fused_loss, reference
from aquila.backend.reference import TRIANGLE_BLOCK, swiglu

__all__ = ["swiglu"]

COMMUNICATION = "gloo"
# Compiled blocks gave 4 to 6 % more tokens/s (dim 512, bf16, two cores) for 8 to 40 s of compiling.
COMPILE_BLOCKS = False
SAVED_IN_SELECTIVE = (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,)
OPTIMIZERS = ("torch",)

attention_kind = common.fused_or_same
step_linear = few_rows.linear
prepare_weight = few_rows.huge_pages


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
    """As `reference.attention`; "fused" is torch's flash attention for CPU."""
    return common.attention(
        q,
        k,
        v,
        kind=kind,
        documents=documents,
        start=start,
        block=block,
        fused=common.sdpa,
        triangle_block=reference.plain_attention,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    return reference.rms_norm(x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotary`, one complex product: a third of the time when nothing is fused."""
    if torch.compiler.is_compiling():
        return reference.rotary(x, cos, sin)
    return _ComplexRotary.apply(x, torch.complex(cos, sin)[:, :, None])


class _ComplexRotary(torch.autograd.Function):
    """x (B, S, H, D) turned by complex units (1 or B, S, 1, D / 2); backward turns the gradient back."""

    @staticmethod
    def forward(ctx, x: Tensor, units: Tensor) -> Tensor:
        ctx.save_for_backward(units)
        return _turn(x, units)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _turn(gradient, ctx.saved_tensors[0].conj()), None


def _turn(x: Tensor, units: Tensor) -> Tensor:
    pairs = torch.view_as_complex(reference.wide(x).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * units).flatten(-2).to(x.dtype)


def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float = 0.0, gradient: bool = True
) -> Tensor:
    """As `reference.cross_entropy_`, each row read from memory once.

    The compiled kernel took 0.06 ms a row of 100008 in bf16 (two cores), blocks of plain torch 0.13.
    """
    losses = fused_loss.cross_entropy_(logits, labels, scale, z_loss, gradient)
    return fused_loss.blocked(logits, labels, scale, z_loss, gradient) if losses is None else losses


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


def device_count() -> int:
    """Ranks that make sense here: one a core at most."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_device(local_rank: int) -> torch.device:
    """Every rank of this machine shares its cores and memory: there is nothing to choose."""
    return torch.device("cpu")


@lru_cache(maxsize=1)
def device_name() -> str:
    """The processor as its vendor calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def supported_precisions() -> tuple[str, ...]:
    """fp16 is left out: DeepSpeed refuses it on CPU."""
    return ("bf16", "fp32")


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
    """What runs each operation on this device, in words."""
    return {
        "attention": "torch SDPA (flash for CPU)",
        "rms_norm": "torch",
        "rotary": "torch",
        "swiglu": "torch",
        "cross_entropy": "compiled, a row at a time" if fused_loss.available() else "blocked, in cache",
        "optimizer": "torch AdamW, fused",
    }
