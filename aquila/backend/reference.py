"""The definition of every operation, in plain torch. The other backends equal this one.

Shapes: B batch, S query positions, T key positions, H query heads, K key heads, D head size, N tokens,
V vocabulary. Inner arithmetic is in fp32, or in fp64 for fp64 inputs (which tests use as the truth).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aquila.backend import fp8, host

ATTENTION_KINDS = ("fused", "triangle", "reference")
TRIANGLE_BLOCK = 512


def upcast(x: Tensor) -> Tensor:
    """x in the dtype of the inner arithmetic: fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- attention -------------------------------------------------------------------------------------------


def visible(queries: int, start: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees: bool (1 or B, S, T), T = start + S.

    The query at row i stands at position start + i and sees the keys up to itself, within its own document.
    `documents` (B, T) numbers the document of every key, or is None.
    """
    keys = start + queries
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal=start)[None]
    if documents is None:
        return causal
    return causal & (documents[:, start:, None] == documents[:, None, :])


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Key or value heads (B, T, K, D) repeated for their query heads: (B, T, H, D), in groups of H / K."""
    groups = heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Tensor | None = None,
    start: int = 0,
    cast: Callable = upcast,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the visible keys, scale 1 / sqrt(D); (B, S, H, D) in and out.

    `cast` makes the operands of both products; the softmax is in fp32 (fp64 for fp64) in any case.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = visible(q.shape[1], start, documents, q.device)[:, None]
    q_BHSD, k_BHTD, v_BHTD = (cast(repeat_heads(x, q.shape[2])).transpose(1, 2) for x in (q, k, v))
    scores = upcast(q_BHSD @ k_BHTD.transpose(-1, -2)) * scale
    probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (probabilities.to(v_BHTD.dtype) @ v_BHTD).transpose(1, 2).to(q.dtype)


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Tensor | None = None,
    start: int = 0,
    block: int = TRIANGLE_BLOCK,
    attend: Callable = plain_attention,
) -> Tensor:
    """Causal attention in blocks of queries, each against its own past: half the square is never computed.

    Block i of `block` queries sees the keys up to its own last one, so any sequence length will do.
    `attend` computes one block with the signature of `plain_attention`.
    """
    parts = []
    for first in range(0, q.shape[1], block):
        rows = q[:, first : first + block]
        end = start + first + rows.shape[1]
        past = None if documents is None else documents[:, :end]
        parts.append(attend(rows, k[:, :end], v[:, :end], documents=past, start=start + first))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def check_attention(q: Tensor, k: Tensor, v: Tensor, kind: str, documents: Tensor | None, start: int) -> None:
    """Raises `ValueError` for an unknown kind or shapes that do not belong together."""
    if kind not in ATTENTION_KINDS:
        raise ValueError(f"attention kind '{kind}' is not one of {', '.join(ATTENTION_KINDS)}")
    if k.shape != v.shape or k.shape[1] != start + q.shape[1] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} with start {start}: "
            "keys and values must be (B, start + S, K, D) with K a divisor of the query heads"
        )
    if documents is not None and documents.shape != (q.shape[0], k.shape[1]):
        raise ValueError(f"documents {tuple(documents.shape)} must be (B, T) = {(q.shape[0], k.shape[1])}")


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
    """Causal attention. q (B, S, H, D); k, v (B, T, K, D) with T = start + S; returns (B, S, H, D).

    `start` is the position of the first query among the keys (the cache's length); `documents` int64 (B, T)
    numbers each key's document and keeps attention within it. Here "fused" is the plain form.
    """
    check_attention(q, k, v, kind, documents, start)
    if kind == "triangle":
        return triangle_attention(q, k, v, documents=documents, start=start, block=block)
    return plain_attention(q, k, v, documents=documents, start=start)


def attention_kind(asked: str) -> str:
    """The kind that "auto" means here."""
    return "reference" if asked == "auto" else asked


# Operators whose results selective recomputation keeps: the two products of plain attention.
SAVED_IN_SELECTIVE = (torch.ops.aten.bmm.default,)
COMPILE_BLOCKS = False
LOGITS_BYTES = {2: 200 << 20, 4: 150 << 20, 8: 300 << 20}
"""Bytes of a chunk of logits, by bytes of a number. Half precision gets more, because fewer chunks mean fewer
roundings of its weight gradient."""
OVERLAP_COMM = True
ZERO_KERNELS = False
TAKES_PARTS = True
KEPT = {"one_pass": 0, "statistics": 4}
fp8_support = host.fp8_support
ENVIRONMENT_DEFAULTS: dict[str, str] = {}


def placement() -> str:
    """Where this rank's threads run, in words; empty where the system decides, as here."""
    return ""


def know_documents(here: Tensor, there: Tensor) -> None:
    """`there`, on a device, has the values of `here`, on the host. Nobody asks for them here."""


# ---- the rest of a block ---------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467), fp32 inside."""
    x_wide = upcast(x)
    scale = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return (x_wide * scale).to(x.dtype) * weight


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (2i, 2i+1) of the head by its position's angle (RoFormer, arXiv 2104.09864).

    x (B, S, H, D); cos, sin fp32 (1 or B, S, D / 2), fp32 inside.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = upcast(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight (V, dim) for tokens (...): (..., dim)."""
    return torch.nn.functional.embedding(tokens, weight)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return torch.nn.functional.silu(gate) * up


def swiglu_halves(gate_up: Tensor) -> Tensor:
    """`swiglu` of the two halves of the last dimension: (..., 2 F) to (..., F)."""
    return swiglu(*gate_up.chunk(2, dim=-1))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T: x (..., K), weight (N, K), returns (..., N)."""
    return torch.nn.functional.linear(x, weight)


def add_weight_gradient(out: Tensor, grad_output: Tensor, x: Tensor, beta: int) -> None:
    """out = beta out + grad_output^T x, in place: out (N, K), grad_output (T, N), x (T, K), beta 0 or 1.

    `out` may be fp32 where the others are narrower.
    """
    if out.dtype == x.dtype:
        out.addmm_(grad_output.t(), x, beta=beta)
    elif x.dtype == torch.float16:  # a sum over tokens may leave fp16's range
        out.addmm_(grad_output.t().float(), x.float(), beta=beta)
    else:
        product = grad_output.t() @ x
        out.add_(product) if beta else out.copy_(product)


def step_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x weight^T for the few rows of a generation step: x (n, K), weight (N, K), returns (n, N) of x's dtype.

    An int8 weight carries `scale` fp32 (N,): its values are weight * scale, row by row.
    """
    if scale is None:
        return torch.nn.functional.linear(x, weight)
    return (torch.nn.functional.linear(x, weight.to(x.dtype)) * scale).to(x.dtype)


class StepRows(NamedTuple):
    """Where the rows of a generation step stand: row i's new token is at position lengths[i]."""

    lengths: list[int]
    places: Tensor  # the same, int64 (n,)
    cos: Tensor  # of these positions, fp32 (n, D / 2)
    sin: Tensor


class LayerWeights(NamedTuple):
    """What a layer multiplies with in a generation step; matrices as in `step_linear`, scales of int8 ones.

    qkv, gate_up: the matrices of queries, keys and values, of gate and up, one behind another.
    """

    attention_norm: Tensor
    qkv: Tensor
    qkv_scale: Tensor | None
    wo: Tensor
    wo_scale: Tensor | None
    ffn_norm: Tensor
    gate_up: Tensor
    gate_up_scale: Tensor | None
    w2: Tensor
    w2_scale: Tensor | None
    eps: float


def step_layers(x: Tensor, layers: Sequence[LayerWeights], kv: Tensor, rows: StepRows) -> Tensor:
    """All layers for one new token a row: x (n, dim) to (n, dim).

    kv (layers, n, 2 K, room, D): as in `step_attention`, for each layer.
    """
    for layer, cache in zip(layers, kv, strict=True):
        normed = rms_norm(x, layer.attention_norm, layer.eps)
        qkv = step_linear(normed, layer.qkv, layer.qkv_scale).view(len(x), -1, kv.shape[-1])
        x = x + step_linear(step_attention(qkv, cache, rows), layer.wo, layer.wo_scale)
        gate_up = step_linear(rms_norm(x, layer.ffn_norm, layer.eps), layer.gate_up, layer.gate_up_scale)
        x = x + step_linear(swiglu_halves(gate_up), layer.w2, layer.w2_scale)
    return x


def prepare_layers(layers: Sequence[LayerWeights]) -> Callable[..., Tensor | None] | None:
    """`step_layers` for these layers, called with x, kv and rows, where a device has all of it as one kernel.

    None, here too, where it has not: then the model's own layers run, one after the other; and so they do
    where the call returns None.
    """


def step_attention(qkv: Tensor, kv: Tensor, rows: StepRows) -> Tensor:
    """Attention of each row's new token over its row of the cache: (n, H D).

    qkv (n, H + 2 K, D): queries, keys and values of the new tokens, not yet turned; it may be overwritten.
    kv (n, 2 K, room, D): keys, then values, of one layer. The new ones are put in at `rows.places`.
    """
    return attend_by_runs(qkv, kv, rows, rotary, _attend_plainly)


def attend_by_runs(qkv: Tensor, kv: Tensor, rows: StepRows, rotate: Callable, attend: Callable) -> Tensor:
    """`step_attention` with a device's own `rotate` (as `rotary`) and `attend`.

    `attend` takes q (n, K, H / K, D), k and v (n, K, T, D) of rows of one length. Neighbouring rows of one
    length attend together and not under a mask with others: the sum over more places, be they masked, rounds
    another way, and in bf16 a row would then depend on its neighbours.
    """
    kv_heads = kv.shape[1] // 2
    heads = qkv.shape[1] - 2 * kv_heads
    turned = rotate(qkv[:, None, : heads + kv_heads], rows.cos[:, None], rows.sin[:, None])[:, 0]
    new = torch.cat((turned[:, heads:], qkv[:, heads + kv_heads :]), dim=1)
    runs = _runs(rows.lengths)
    if len(runs) == 1:
        kv[:, :, rows.lengths[0]] = new
    else:
        kv[torch.arange(len(kv), device=kv.device), :, rows.places] = new
    q = turned[:, :heads].unflatten(1, (kv_heads, -1))  # (n, K, H / K, D)
    out = [attend(q[run], kv[run, :kv_heads, :seen], kv[run, kv_heads:, :seen]) for run, seen in runs]
    return (out[0] if len(out) == 1 else torch.cat(out)).flatten(1)


def _runs(lengths: list[int]) -> list[tuple[slice, int]]:
    """Neighbouring rows of one length, and that length with the new token."""
    runs, start = [], 0
    for length, rows in itertools.groupby(lengths):
        stop = start + len(list(rows))
        runs.append((slice(start, stop), length + 1))
        start = stop
    return runs


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = upcast(q) @ upcast(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ upcast(v)).to(q.dtype)


def prepare_generation() -> None:
    """Readies this process for generation alone, where every call has new lengths; nothing to do here."""


def prepare_weight(weight: Tensor) -> None:
    """Readies a weight in place for many calls of `step_linear`; here there is nothing to do."""


def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float = 0.0, gradient: bool = True
) -> Tensor:
    """Each token's loss -log p(label) + z_loss * lse^2, fp32 (N,); lse is the log of the softmax's sum.

    With `gradient`, `logits` (N, V) are overwritten by the gradient of sum(scale * loss) with respect to
    them: scale * ((1 + 2 z_loss lse) p - onehot). `labels` int64 (N,), `scale` fp32 (N,).
    """
    index, scale = labels[:, None], scale[:, None]
    x = upcast(logits)
    lse = torch.logsumexp(x, dim=1, keepdim=True)
    losses = lse - x.gather(1, index) + z_loss * lse.square()
    if gradient:
        grad_logits = (x - lse).exp() * (scale * (1 + 2 * z_loss * lse))
        logits.copy_(grad_logits.scatter_add(1, index, -scale.to(x.dtype)))
    return losses[:, 0]


def whole_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, z_loss: float, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Losses as of `cross_entropy_` for the logits hidden weight^T, and gradients of sum(scale * loss).

    hidden (N, dim), weight (V, dim); labels int64 (N,), scale fp32 (N,). Returns fp32 (N,) and, where
    `wanted`, the gradients of hidden and weight, which may be of a wider dtype. None where no kernel does
    all at once, as here: the model then goes through the logits in chunks.
    """
    return None


# ---- optimizer and machine -------------------------------------------------------------------------------


def square_sum(pieces: Iterable[Tensor]) -> Tensor:
    """The sum of the squares in all pieces: a scalar in fp64, for it must not depend on how they were cut."""
    sums = [torch.linalg.vector_norm(x.double()).square() for x in pieces]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)


AdamBlock = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""weights, master, gradient, exp_avg, exp_avg_sq; all flat; weights and gradient in the training dtype, the
others in fp32."""


def adamw(
    blocks: Iterable[AdamBlock], step: Tensor, settings: dict[str, Any], factor: float | Tensor
) -> None:
    """One AdamW step (arXiv 1711.05101) of each block's master weights, and their copy in the training dtype.

    Gradients are multiplied by `factor` (a scalar, unscaling and clipping) in fp32. step: fp32 scalar on the
    device, already counted. settings: a group of the optimizer.
    """
    beta1, beta2 = settings["betas"]
    for weights, master, gradient, exp_avg, exp_avg_sq in blocks:
        grad = gradient.to(master.dtype)
        if isinstance(factor, Tensor) or factor != 1.0:
            grad = grad * factor if grad is gradient else grad.mul_(factor)
        torch._fused_adamw_(
            [master], [grad], [exp_avg], [exp_avg_sq], [], [step],
            lr=settings["lr"], beta1=beta1, beta2=beta2, weight_decay=settings["weight_decay"],
            eps=settings["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        weights.copy_(master)


@contextmanager
def profiling(stem: Path) -> Iterator[torch.profiler.profile]:
    """torch's profiler over the block; writes `stem`.trace.json.gz at its end."""
    with torch.profiler.profile() as profile:
        yield profile
    profile.export_chrome_trace(f"{stem}.trace.json.gz")


def convert_to_fp8(layers: nn.Module, recipe: str) -> None:
    """Makes the linear layers within `layers` multiply in float8 (`fp8.convert`). Raises `UserError`."""
    fp8.convert(layers, recipe, emulate=True)


OPTIMIZERS = ("torch",)
COMMUNICATION = "gloo"


def optimizer_kind(asked: str = "auto") -> str:
    """The optimizer that "auto" means on this device."""
    return "torch" if asked == "auto" else asked


def optimizer(
    kind: str, params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), one tensor at a time. Raises `ValueError` for a kind not in `OPTIMIZERS`."""
    if optimizer_kind(kind) != "torch":
        raise ValueError(f"optimizer '{kind}' is not one of {', '.join(OPTIMIZERS)}")
    return torch.optim.AdamW(
        params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False, fused=False
    )
