"""Ascend NPU through torch_npu's operators (`torch.ops.npu`), read off torch_npu 2.13.0.

No NPU was at hand: these calls are tested against the operators' schemas, against CPU kernels of their
documented meaning, and traced through torch_npu's own meta and autograd code. Their numerics, their speed
and HCCL have not run on a device. Every call goes through `_call`, which holds it to the documented limits.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from aquila.backend import affinity, common, npu_limits, reference
from aquila.backend.made_once import MadeOnce
from aquila.backend.npu_limits import COMPRESSED_MASK, RIGHT_DOWN_CAUSAL, SIZES
from aquila.backend.reference import TRIANGLE_BLOCK
from aquila.core.errors import UserError

COMMUNICATION = "hccl"
COMPILE_BLOCKS = False
LOGITS_BYTES = reference.LOGITS_BYTES
# DeepSpeed 0.19 orders its reduction stream by the same waits as on CUDA. Still, gradients that turned NaN in
# mid-run over several Ascend nodes have been laid to overlap (LlamaFactory #5627, #8439); not settled here.
OVERLAP_COMM = False
ZERO_KERNELS = False
TAKES_PARTS = False
KEPT = {"one_pass": 1, "statistics": 64}
DETERMINISTIC: dict[str, tuple[str, ...]] = {
    "HCCL_DETERMINISTIC": ("true", "strict"),
    "LCCL_DETERMINISTIC": ("1",),
}
OPTIMIZERS = ("torch",)
# Set where the user has not, before the device is first used; as the vendor's training scripts do, the effect
# on a device not measured here.
# Ranks may come to the first collective half an hour apart (cold disks); a hang is our watchdog's to end.
ENVIRONMENT_DEFAULTS = {
    "TASK_QUEUE_ENABLE": "2",
    "CPU_AFFINITY_CONF": "1",
    "HCCL_CONNECT_TIMEOUT": "1800",
    "HCCL_EXEC_TIMEOUT": "3600",
    # Ports that nobody else has, by CANN's own choice: those of a killed run may be bound for a while.
    "HCCL_HOST_SOCKET_PORT_RANGE": "auto",
    "HCCL_NPU_SOCKET_PORT_RANGE": "auto",
}

# What torch does as well here as anything else.
adamw = reference.adamw
attention_kind = common.fused_or_same
add_weight_gradient = reference.add_weight_gradient
embedding = reference.embedding
linear = reference.linear
prepare_generation = reference.prepare_generation
prepare_layers = reference.prepare_layers
prepare_weight = reference.prepare_weight
step_linear = reference.step_linear
whole_cross_entropy = reference.whole_cross_entropy

_SOFTMAX_KEYS = SIZES["npu_scaled_masked_softmax"]["keys"]
_PACKED_DOCUMENTS = SIZES["npu_fusion_attention"]["packed documents"].high
_ROTARY_ROWS = SIZES["npu_rotary_mul"]["batch x heads"]
_SUM_ROW = 512  # squares summed plainly
_FP16_SCORE = 1024.0  # the original's bound of a score in fp16
# Names of the first generation, as torch_npu lists them. By the vendor's product tables it lacks bf16,
# npu_fusion_attention, npu_swiglu, npu_cross_entropy_loss and the interleaved rotary. A bare "Ascend910B" is
# one of them; 910B1 to B4 are not.
_FIRST_GENERATION = re.compile(r"Ascend910(PremiumA|ProA|ProB|A|B)?")
# NpuFusedAdamW combines parameters and gradients into flat buffers once (its source; seen on a simulated
# NPU); DeepSpeed gives each step new gradients. Ascend's apex has the same design as described; not run.
_FLAT_BUFFERS = ("npu", "apex")
# Dense bf16 and fp16 peak of a device in TFLOP/s, from public tables, none of them a data sheet: 910B1 to B4
# as FlagPerf and the vendor's model repositories give them; 910_939x (A3) as half of a package of two dies,
# 752 (arXiv 2506.12708). Smaller A3 bins: unknown, so that no MFU is shown.
_PEAKS = {"910B1": 400, "910B2": 376, "910B3": 313, "910B4": 280, "910_939": 376}

_NO_FP8 = "torchao's float8 layers do not run on an NPU; say fp8: false"
convert_to_fp8 = partial(common.refuse_fp8, _NO_FP8)

# What every layer of a step needs again. Where each row's documents end, on the host: the kernel takes a
# list, asked of the device. Masks of the triangle's blocks. Angles, each twice for its pair.
_PLACED: list[str] = []
_ENDS, _MASKS, _ANGLES = MadeOnce(64), MadeOnce(), MadeOnce()


def __getattr__(name: str):
    """`SAVED_IN_SELECTIVE`, found when asked for: the operator exists once torch_npu has been imported."""
    if name == "SAVED_IN_SELECTIVE":
        return (torch.ops.npu.npu_fusion_attention.default, torch.ops.npu.npu_scaled_masked_softmax.default)
    raise AttributeError(name)


def _call(operator: str, *arguments: Any, **options: Any) -> Any:
    """torch_npu's operator. Raises `ValueError` for what leaves its documented limits."""
    npu_limits.check(operator, *arguments, **options)
    return getattr(torch.ops.npu, operator)(*arguments, **options)


# ---- attention -------------------------------------------------------------------------------------------


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
    """As `reference.attention`; "fused" is `npu_fusion_attention`, "triangle" its softmax by blocks."""
    if kind == "triangle" and start == 0:
        reference.check_attention(q, k, v, kind, documents, start)
        return _padded_triangle(q, k, v, documents, block)
    return common.attention(
        q,
        k,
        v,
        kind=kind,
        documents=documents,
        start=start,
        block=block,
        fused=_fused,
        triangle_block=common.narrow_attention,
    )


def _fused(q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None, start: int) -> Tensor:
    if documents is not None and start == 0:
        return _fused_packed(q, k, v, document_ends(documents))
    mask, mode = None, 0
    if documents is not None:
        mask = ~reference.visible(q.shape[1], start, documents, q.device)[:, None]  # (B, 1, S, T)
    elif q.shape[1] > 1:
        mask, mode = _compressed_mask(q.device), RIGHT_DOWN_CAUSAL
    return fusion_attention(q, k, v, layout="BSND", atten_mask=mask, sparse_mode=mode)


def _fused_packed(q: Tensor, k: Tensor, v: Tensor, ends: list[int]) -> Tensor:
    """Documents of all rows as one packed sequence (T, heads, D), each attending to itself alone.

    The kernel takes a limited number of documents; more than that go in several calls.
    """
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    mask, parts, begin = _compressed_mask(q.device), [], 0
    for first in range(0, len(ends), _PACKED_DOCUMENTS):
        group = ends[first : first + _PACKED_DOCUMENTS]
        rows = slice(begin, group[-1])
        parts.append(
            fusion_attention(
                *(x[rows] for x in packed),
                layout="TND",
                atten_mask=mask,
                sparse_mode=RIGHT_DOWN_CAUSAL,
                ends=[end - begin for end in group],
            )
        )
        begin = group[-1]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.unflatten(0, q.shape[:2])


@lru_cache(maxsize=8)
def _compressed_mask(device: torch.device) -> Tensor:
    return torch.ones(COMPRESSED_MASK, COMPRESSED_MASK, dtype=torch.bool, device=device).triu(diagonal=1)


def document_ends(documents: Tensor) -> list[int]:
    """Where each document ends in the rows of (B, S) laid end to end; a row's end ends a document."""
    return _ENDS.of(documents, lambda: _document_ends(documents.tolist()))


def know_documents(here: Tensor, there: Tensor) -> None:
    """`there`, on the device, has the values of `here`, on the host: it need not be asked for them."""
    _ENDS.put(there, _document_ends(here.tolist()))


def _document_ends(rows: list[list[int]]) -> list[int]:
    ends, position = [], 0
    for row in rows:
        for number, following in zip(row, [*row[1:], None], strict=True):
            position += 1
            if number != following:
                ends.append(position)
    return ends


def fusion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str,
    atten_mask: Tensor | None,
    sparse_mode: int,
    ends: list[int] | None = None,
) -> Tensor:
    """`npu_fusion_attention`. `ends`: cumulative lengths, for layout TND."""
    lengths = {} if ends is None else {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    return _call(
        "npu_fusion_attention",
        q,
        k,
        v,
        q.shape[-2],
        layout,
        atten_mask=atten_mask,
        scale=q.shape[-1] ** -0.5,
        keep_prob=1.0,
        sparse_mode=sparse_mode,
        **lengths,
    )[0]


def _padded_triangle(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, block: int) -> Tensor:
    """The triangle over a sequence padded to the softmax kernel's step; no real query sees the padding.

    Heads are repeated and turned to the front once, not in every block. Beyond 4096 keys: plain torch.
    """
    if block % _SOFTMAX_KEYS.step:
        raise ValueError(f"triangle block {block} must be a multiple of {_SOFTMAX_KEYS.step} on this device")
    length = q.shape[1]
    extra = -length % _SOFTMAX_KEYS.step
    if length + extra > _SOFTMAX_KEYS.high:
        attend = common.narrow_attention
        return reference.triangle_attention(q, k, v, documents=documents, block=block, attend=attend)
    hidden = _future(length + extra, block, q.device)
    if documents is not None:
        hidden = _MASKS.of(documents, lambda: _hidden(documents, block), block)
    scale = q.shape[-1] ** -0.5
    if q.dtype == torch.float16:  # before the product, which would leave fp16's range
        q, scale = q * scale, 1.0
    if extra:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, extra)) for x in (q, k, v))
    q_BHSD, k_BHTD, v_BHTD = (
        reference.repeat_heads(x, q.shape[2]).transpose(1, 2).contiguous() for x in (q, k, v)
    )
    parts = []
    for first, mask in zip(range(0, length, block), hidden, strict=True):
        end = first + mask.shape[2]
        scores = q_BHSD[:, :, first:end] @ k_BHTD[:, :, :end].transpose(-1, -2)
        if q.dtype == torch.float16:
            scores = scores.clamp(-_FP16_SCORE, _FP16_SCORE)
        parts.append(scaled_masked_softmax(scores, mask, scale).to(v.dtype) @ v_BHTD[:, :, :end])
    return torch.cat(parts, dim=2).transpose(1, 2)[:, :length]


@lru_cache(maxsize=8)
def _future(length: int, block: int, device: torch.device) -> list[Tensor]:
    """What each block of queries must not see: bool (1, 1, S, T), True for the keys after a query."""
    starts = range(0, length, block)
    return [~reference.visible(min(block, length - first), first, None, device)[:, None] for first in starts]


def _hidden(documents: Tensor, block: int) -> list[Tensor]:
    """As `_future`, and other documents: bool (B, 1, S, T), of the padded sequence."""
    extra = -documents.shape[1] % _SOFTMAX_KEYS.step
    padded = torch.cat((documents, documents[:, -1:].expand(-1, extra)), dim=1) if extra else documents
    length, masks = padded.shape[1], []
    for first in range(0, length, block):
        rows = min(block, length - first)
        seen = reference.visible(rows, first, padded[:, : first + rows], documents.device)
        masks.append(~seen[:, None])
    return masks


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`npu_scaled_masked_softmax`: x (B, H, S, T), mask bool, True = hidden."""
    return _call("npu_scaled_masked_softmax", x, mask, scale, False)


# ---- the rest of a block ---------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`; the kernel wants its weight in the input's dtype."""
    return _call("npu_rms_norm", x, weight.to(x.dtype), eps)[0]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotary`, interleaved, in x's dtype: fp32 inside, by cos and sin rounded to that dtype.

    The kernel takes cos and sin of no other dtype than x's. What is turned so is 1.28 times as far from the
    truth as what is turned by fp32 tables and rounded then (test_npu.py holds it).
    """
    return _Rotary.apply(x, *_ANGLES.of(cos, lambda: _pairs(cos, sin, x.dtype), x.dtype))


class _Rotary(torch.autograd.Function):
    """Its gradient turns back by the same angle: nothing of the size of x is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(cos, back)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return _turn(grad_output, *ctx.saved_tensors), None, None, None


def _pairs(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin and -sin of each angle twice, for its pair: (1 or B, S, 1, D)."""
    twice, turned = (part.repeat_interleave(2, dim=-1)[:, :, None].to(dtype) for part in (cos, sin))
    return twice, turned, -turned


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, S, H, D) turned by angles (1 or B, S, 1, D)."""
    rows, _, heads, _ = x.shape
    inner, angles = x, [cos, sin]
    if cos.shape[0] > 1 or rows * heads not in _ROTARY_ROWS:
        # The kernel spreads angles over heads and a few rows, and takes no batch of angles: one long row.
        angles = [table.expand(rows, -1, -1, -1).flatten(0, 1)[None] for table in angles]
        inner = inner.flatten(0, 1)[None]
    return _call("npu_rotary_mul", inner, *angles, "interleave").view(x.shape)


def step_attention(qkv: Tensor, kv: Tensor, rows: reference.StepRows) -> Tensor:
    """As `reference.step_attention`, by torch's fused attention."""
    return common.step_attention(qkv, kv, rows, rotary)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.swiglu`; the kernel takes both halves as one tensor."""
    return swiglu_halves(torch.cat((gate, up), dim=-1))


def swiglu_halves(gate_up: Tensor) -> Tensor:
    """As `reference.swiglu_halves`."""
    return _call("npu_swiglu", gate_up.contiguous(), -1)


def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float = 0.0, gradient: bool = True
) -> Tensor:
    """As `reference.cross_entropy_`, over the kernel's log-probabilities.

    Its own gradient knows no z-loss; ours is made here. Nothing is gathered, which CANN does on the device's
    scalar cores for more than 2000 rows of a large tensor: the greatest entries tell the log of the sum, too.
    """
    x = reference.upcast(logits)
    losses, log_probabilities, _, _ = _call("npu_cross_entropy_loss", x, labels, reduction="none")
    lse = x.amax(1) - log_probabilities.amax(1) if z_loss else None
    if gradient:
        share = scale if lse is None else scale * (1 + 2 * z_loss * lse)
        slope = log_probabilities.exp_().mul_(share[:, None])
        logits.copy_(slope.scatter_add_(1, labels[:, None], -scale[:, None]))
    return losses if lse is None else losses + z_loss * lse.square()


# ---- optimizer and machine -------------------------------------------------------------------------------


def square_sum(pieces: Iterable[Tensor]) -> Tensor:
    """As `reference.square_sum`, but fp32: the device has no fp64, and makes fp32 of it without a word.

    Rows of squares in fp32; their sums in pairs, each with its rounding error beside it (Knuth's TwoSum), so
    that the sum is as good as one in twice fp32's digits.
    """
    rows = [sums for x in pieces for sums in _row_sums(reference.upcast(x).flatten().square())]
    high = torch.cat(rows) if rows else torch.zeros(1)
    low = torch.zeros_like(high)
    while len(high) > 1:
        if len(high) % 2:
            high, low = F.pad(high, (0, 1)), F.pad(low, (0, 1))
        (a, b), (c, d) = high.chunk(2), low.chunk(2)
        high = a + b
        added = high - a
        low = c + d + ((a - (high - added)) + (b - added))
    return (high + low)[0]


def _row_sums(squares: Tensor) -> list[Tensor]:
    whole = len(squares) // _SUM_ROW * _SUM_ROW
    return [squares[:whole].view(-1, _SUM_ROW).sum(1), squares[whole:].sum()[None]]


def optimizer_kind(asked: str = "auto") -> str:
    """torch's AdamW as one fused kernel, which torch_npu maps to aclnnApplyAdamWV2."""
    return "torch" if asked == "auto" else asked


def optimizer(
    kind: str, params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW. Raises `UserError` for a kind that does not work under DeepSpeed here."""
    kind = optimizer_kind(kind)
    if kind in _FLAT_BUFFERS:
        raise UserError(
            f"optimizer: '{kind}' keeps the first step's gradients in flat buffers of its own, while "
            "DeepSpeed gives each step new ones: it would fail, or apply old ones; there are: auto, torch"
        )
    if kind == "torch":
        return common.torch_adamw(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    raise common.refuse_optimizer(kind, OPTIMIZERS)


@contextmanager
def profiling(stem: Path) -> Iterator[Any]:
    """torch_npu's own profiler, which writes its tables and trace into the folder `stem`.npu at its end."""
    from torch_npu import profiler

    activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
    done = profiler.tensorboard_trace_handler(f"{stem}.npu")
    with profiler.profile(activities=activities, on_trace_ready=done) as profile:
        yield profile
        torch.npu.synchronize()


def device_count() -> int:
    """NPUs that this process may use: 0 without torch_npu or without a device."""
    if common.find("torch_npu", "npu") is None or not torch.npu.is_available():
        return 0
    return torch.npu.device_count()


def set_device(local_rank: int) -> torch.device:
    """Makes the rank's NPU the current one.

    Raises `ValueError` when there are fewer, `UserError` on a chip that lacks the operators used here.
    """
    if local_rank >= device_count():
        raise ValueError(f"local rank {local_rank} has no NPU: {device_count()} are visible")
    _PLACED[:] = [place_threads(local_rank)]
    common.set_defaults(ENVIRONMENT_DEFAULTS)
    torch.npu.set_device(local_rank)
    if _FIRST_GENERATION.fullmatch(device_name()):
        raise UserError(
            f"{device_name()} is of the first Ascend 910 generation, which lacks npu_fusion_attention, "
            "npu_swiglu and npu_cross_entropy_loss; train on a 910B1 to 910B4 or a later chip"
        )
    return torch.device("npu", local_rank)


def place_threads(local_rank: int) -> str:
    """Keeps the rank's threads near its device, before torch_npu starts its own. Returns a line about it.

    torch_npu's CPU_AFFINITY_CONF=1 gives each device an equal run of cores, wherever it is attached: that is
    for machines on which the device's place is not known. What the user says there stays.
    """
    if asked := os.environ.get("CPU_AFFINITY_CONF"):
        return f"threads: as CPU_AFFINITY_CONF={asked} says"
    number = affinity.device_number(local_rank, os.environ.get("ASCEND_RT_VISIBLE_DEVICES"))
    addresses = affinity.bus_addresses()
    if number is None or number >= len(addresses):
        return "threads: CPU_AFFINITY_CONF=1, for npu-smi does not tell where the device is"
    bound, line = affinity.bind_near(addresses[number])
    if bound:
        os.environ["CPU_AFFINITY_CONF"] = "0"
    return line


def placement() -> str:
    """Where this rank's threads run, in words; empty before `set_device`."""
    return "".join(_PLACED)


make_deterministic = partial(common.make_deterministic, DETERMINISTIC)
allocate_compactly = common.allocate_compactly


def device_name() -> str:
    """The NPU as its vendor calls it."""
    return torch.npu.get_device_name()


def supported_precisions() -> tuple[str, ...]:
    """What the device takes; the first Ascend 910 has no bf16."""
    return ("fp16", "fp32") if _FIRST_GENERATION.fullmatch(device_name()) else ("bf16", "fp16", "fp32")


def fp8_support() -> str:
    """Why linear layers in float8 cannot run here."""
    return _NO_FP8


def memory_gib() -> float:
    """Peak memory that torch has held on this device, in GiB."""
    return torch.npu.max_memory_reserved() / 2**30


def peak_flops(dtype: torch.dtype) -> float | None:
    """Dense fp16 and bf16 peak of this device in FLOP/s; None for fp32 or a name not known here."""
    known = max((key for key in _PEAKS if key in device_name()), key=len, default=None)
    return None if known is None or dtype == torch.float32 else _PEAKS[known] * 1e12


def synchronize() -> None:
    """Waits until the device has done what it was given."""
    torch.npu.synchronize()


def kernels() -> dict[str, str]:
    """What runs each operation on this device, in words."""
    return {
        "attention": "npu_fusion_attention, or triangle through npu_scaled_masked_softmax",
        "rms_norm": "npu_rms_norm",
        "rotary": "npu_rotary_mul, interleave",
        "swiglu": "npu_swiglu",
        "cross_entropy": "npu_cross_entropy_loss",
        "optimizer": "torch.optim.AdamW, fused",
    }
