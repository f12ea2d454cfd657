"""What torch_npu's operators take on Ascend 910B1 to B4 and A3, as the vendor's documents have it: data.

A page an operator in docs/zh/custom_APIs/torch_npu/ of Ascend/op-plugin, read at commit 517f2e7d of August
2026; that the angles of `npu_rotary_mul` have the dtype of what they turn is said of its kernel alone, in
posembedding/rotary_position_embedding/docs/aclnnRotaryPositionEmbedding.md of CANN's ops-transformer
(c29bc106). What a kernel does beyond its limits is not known here, and torch_npu's shape functions hardly
look; so every call is checked before it is made (`check`). What this project never asks for is not in here:
dropout, position codes, other layouts and sparse modes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Span:
    """Sizes from `low` to `high`, in steps of `step`."""

    low: int
    high: int
    step: int = 1

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high and size % self.step == 0

    def __str__(self) -> str:
        steps = f" in steps of {self.step}" if self.step > 1 else ""
        return f"{self.low} to {self.high}{steps}"


SIZES: dict[str, dict[str, Span]] = {
    "npu_fusion_attention": {
        "batch": Span(1, 2 << 20),
        "sequence": Span(1, 1 << 20),
        "query heads": Span(1, 256),
        "head size": Span(1, 768),
        "packed documents": Span(1, 1024),
        "packed tokens": Span(1, 1 << 20),
    },
    "npu_scaled_masked_softmax": {"rows": Span(32, 4096, 32), "keys": Span(32, 4096, 32)},
    "npu_rotary_mul": {"batch x heads": Span(1, 999), "head size": Span(2, 894, 2)},
    "npu_rms_norm": {"dimensions": Span(2, 8)},
    "npu_swiglu": {"dimensions": Span(1, 8), "width": Span(2, 1 << 62, 2)},
    "npu_cross_entropy_loss": {"tokens": Span(1, 200_000), "classes": Span(1, 1 << 62)},
}
COMPRESSED_MASK = 2048
"""Rows and columns of the mask that the causal sparse modes take, whatever the sequence length."""
LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL = 2, 3
"""The causal sparse modes: aligned at the first query and key, or at the last."""


def check(operator: str, *arguments: object, **options: object) -> None:
    """Raises `ValueError` where a call of `operator` with these arguments leaves its documented limits."""
    CHECKS[operator](*arguments, **options)


def _refuse(operator: str, why: str) -> None:
    raise ValueError(f"{operator}: {why}")


def _sizes(operator: str, **found: int) -> None:
    for name, size in found.items():
        span = SIZES[operator][name.replace("_", " ")]
        if size not in span:
            _refuse(operator, f"{name.replace('_', ' ')} {size}; its documents allow {span}")


def _dtypes(operator: str, x: Tensor, *others: Tensor) -> None:
    """All of one dtype, of those that every operator here takes."""
    if x.dtype not in FLOATS or any(other.dtype != x.dtype for other in others):
        found = ", ".join(str(t.dtype).removeprefix("torch.") for t in (x, *others))
        _refuse(operator, f"takes fp16, bf16 or fp32, the same for all its tensors, not {found}")


def _fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    sparse_mode: int = 0,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    **rest: float,
) -> None:
    name = "npu_fusion_attention"
    if input_layout not in ("BSND", "TND"):
        _refuse(name, f"layout '{input_layout}' is not one of BSND, TND")
    _dtypes(name, query, key, value)
    if head_num != query.shape[-2] or head_num % key.shape[-2]:
        _refuse(name, f"{query.shape[-2]} query heads are no multiple of {key.shape[-2]} key heads")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        _refuse(name, f"keys {tuple(key.shape)}, values {tuple(value.shape)} of queries {tuple(query.shape)}")
    _sizes(name, query_heads=head_num, head_size=query.shape[-1])
    packed = input_layout == "TND"
    if packed != (actual_seq_qlen is not None and actual_seq_kvlen is not None):
        _refuse(name, "cumulative lengths belong to layout TND, and to it alone")
    if packed:
        for ends, tokens in ((actual_seq_qlen, len(query)), (actual_seq_kvlen, len(key))):
            _packed(name, ends or [], tokens)
    else:
        _sizes(name, batch=query.shape[0])
        for length in (query.shape[1], key.shape[1]):
            _sizes(name, sequence=length)
    _mask(name, atten_mask, sparse_mode, (*query.shape[:-2], head_num), key.shape[-3])


def _packed(name: str, ends: list[int], tokens: int) -> None:
    _sizes(name, packed_documents=len(ends), packed_tokens=tokens)
    if ends[-1] != tokens or any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
        _refuse(name, f"lengths must rise to {tokens}, got {ends[:8]} ...")


def _mask(name: str, mask: Tensor | None, mode: int, queries: tuple[int, ...], keys: int) -> None:
    """`queries`: (B, S, heads), packed (T, heads)."""
    if mask is None:
        if mode:
            _refuse(name, "without atten_mask sparse_mode is ignored: not causal at all")
        return
    if mask.dtype not in (torch.bool, torch.uint8):
        _refuse(name, f"atten_mask is {mask.dtype}, must be bool or uint8")
    if mode not in (0, LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL):
        _refuse(name, f"sparse_mode {mode} is not one of 0, {LEFT_UP_CAUSAL}, {RIGHT_DOWN_CAUSAL}")
    if mode:
        if tuple(mask.shape) != (COMPRESSED_MASK, COMPRESSED_MASK):
            _refuse(name, f"sparse_mode {mode} needs a {COMPRESSED_MASK} x {COMPRESSED_MASK} mask")
        return
    if len(queries) == 2:
        _refuse(name, "a mask of its own is not tried here for layout TND")
    batch, rows, heads = queries
    allowed = [(rows, keys), *((b, h, rows, keys) for b, h in ((batch, heads), (batch, 1), (1, 1)))]
    if tuple(mask.shape) not in allowed:
        _refuse(name, f"atten_mask {tuple(mask.shape)} is not one of {', '.join(map(str, allowed))}")


def _scaled_masked_softmax(
    x: Tensor, mask: Tensor, scale: float = 1.0, fixed_triu_mask: bool = False
) -> None:
    name = "npu_scaled_masked_softmax"
    _dtypes(name, x)
    if mask.dtype != torch.bool:
        _refuse(name, f"the mask is {mask.dtype}, must be bool")
    if fixed_triu_mask:
        _refuse(name, "fixed_triu_mask is documented as unfinished")
    if torch.broadcast_shapes(mask.shape, x.shape) != x.shape:
        _refuse(name, f"a mask {tuple(mask.shape)} does not spread over {tuple(x.shape)}")
    _sizes(name, rows=x.shape[-2], keys=x.shape[-1])


def _rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> None:
    name = "npu_rotary_mul"
    if rotary_mode != "interleave" or input.dim() != 4:
        _refuse(name, f"{input.dim()} dimensions in mode '{rotary_mode}'; here 4 are interleaved")
    _dtypes(name, input, r1, r2)
    rows, length, heads, size = input.shape
    _sizes(name, batch_x_heads=rows * heads, head_size=size)
    if r1.shape != (1, length, 1, size) or r2.shape != r1.shape:
        _refuse(name, f"angles {tuple(r1.shape)}, {tuple(r2.shape)} must be {(1, length, 1, size)}")


def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    name = "npu_rms_norm"
    _dtypes(name, input, gamma)
    _sizes(name, dimensions=input.dim())
    if gamma.shape != input.shape[-gamma.dim() :]:
        _refuse(name, f"gamma {tuple(gamma.shape)} is not the end of {tuple(input.shape)}")


def _swiglu(input: Tensor, dim: int = -1) -> None:
    name = "npu_swiglu"
    _dtypes(name, input)
    _sizes(name, dimensions=input.dim(), width=input.shape[dim])
    if not input.is_contiguous() or not input.numel():
        _refuse(name, f"{tuple(input.shape)} must be contiguous and not empty")


def _cross_entropy_loss(input: Tensor, target: Tensor, *, reduction: str = "mean") -> None:
    name = "npu_cross_entropy_loss"
    _dtypes(name, input)
    tokens, classes = input.shape
    _sizes(name, tokens=tokens, classes=classes)
    if target.dtype != torch.int64 or target.shape != (tokens,):
        _refuse(name, f"labels {target.dtype} {tuple(target.shape)} must be int64 {(tokens,)}")


CHECKS: dict[str, Callable[..., None]] = {
    "npu_fusion_attention": _fusion_attention,
    "npu_scaled_masked_softmax": _scaled_masked_softmax,
    "npu_rotary_mul": _rotary_mul,
    "npu_rms_norm": _rms_norm,
    "npu_swiglu": _swiglu,
    "npu_cross_entropy_loss": _cross_entropy_loss,
}
"""What looks at a call, with the operator's own parameters as far as this project uses them."""
