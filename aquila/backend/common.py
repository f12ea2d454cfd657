"""What several devices share: torch's fused attention, attention products in the input's dtype, AdamW."""

import os
from collections.abc import Callable, Iterable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquila.backend import reference
from aquila.core.errors import UserError


def set_defaults(variables: dict[str, str]) -> None:
    """Sets each variable of the environment that the user has not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    documents: Tensor | None,
    start: int,
    block: int,
    fused: Callable,
    triangle_block: Callable,
) -> Tensor:
    """`reference.attention` with a device's own `fused` kernel and `triangle_block`."""
    reference.check_attention(q, k, v, kind, documents, start)
    if kind == "fused":
        return fused(q, k, v, documents=documents, start=start)
    if kind == "triangle":
        return reference.triangle_attention(
            q, k, v, documents=documents, start=start, block=block, attend=triangle_block
        )
    return reference.plain_attention(q, k, v, documents=documents, start=start)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None, start: int) -> Tensor:
    """torch's fused attention; a mask is built only where "causal" alone does not say it."""
    queries = q.shape[1]
    mask, causal = None, False
    if documents is not None or (start > 0 and queries > 1):
        mask = reference.visible(queries, start, documents, q.device)[:, None]
    elif queries > 1:  # a branch, not the comparison's value: while tracing that is a symbol, and no bool
        causal = True
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def step_attention(qkv: Tensor, kv: Tensor, rows: reference.StepRows, rotate: Callable) -> Tensor:
    """`reference.step_attention` with a device's rotary embedding and torch's fused attention."""
    return reference.attend_by_runs(qkv, kv, rows, rotate, F.scaled_dot_product_attention)


def _same(x: Tensor) -> Tensor:
    return x


def narrow_attention(
    q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None = None, start: int = 0
) -> Tensor:
    """Products in the input's dtype, as matrix units want them; the softmax between them in fp32.

    In fp16 q is scaled before the product, which would leave its range.
    """
    scale = q.shape[-1] ** -0.5
    if q.dtype == torch.float16:
        q, scale = q * scale, 1.0
    return reference.plain_attention(q, k, v, documents=documents, start=start, cast=_same, scale=scale)


def fused_or_same(asked: str) -> str:
    """The fused kernel computes what the triangle does, in less memory: "auto" is fused in any case."""
    return "fused" if asked == "auto" else asked


def torch_adamw(
    params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """torch's AdamW as one fused kernel."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def find(module: str, name: str):
    """An optional attribute of an optional package, or None: `find("apex.optimizers", "FusedAdam")`."""
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, OSError, RuntimeError):
        return None


def refuse_optimizer(kind: str, known: tuple[str, ...]) -> UserError:
    """The error for an optimizer that this device does not build."""
    return UserError(
        f"optimizer: '{kind}' cannot be built on this device; there are: auto, {', '.join(known)}"
    )


def refuse_fp8(reason: str, layers: nn.Module, recipe: str) -> None:
    """`convert_to_fp8` of a device that cannot. Raises `UserError`."""
    raise UserError(f"fp8: {recipe}: {reason}")


def allocate_compactly() -> None:
    """Nothing to do: the allocator of an accelerator joins what was freed."""


def make_deterministic(variables: dict[str, tuple[str, ...]]) -> None:
    """Lets torch take only kernels that give the same bits each time; others raise when they are called.

    `variables`: what the device's libraries read, each with the values that will do; the first is set where
    the user has set none. To be called before the device has computed anything. Raises `UserError` where the
    environment says the contrary.
    """
    for name, values in variables.items():
        if os.environ.setdefault(name, values[0]) not in values:
            raise UserError(
                f"deterministic is True, but {name}={os.environ[name]} in the environment is not; unset it, "
                f"or say {name}={values[0]}"
            )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    from torch._inductor import config

    if hasattr(config, "deterministic"):  # from torch 2.9 on: no choice of a kernel by timing
        config.deterministic = True
