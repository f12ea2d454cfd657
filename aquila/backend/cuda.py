"""NVIDIA GPU: torch's fused attention and norms; loss, AdamW and the gradients' norm as compiled kernels.

`python -m aquila.accept` checks it on the GPU that is there; benchmarks/LOG.md says on which it has run.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquila.backend import common, fp8, reference
from aquila.backend.reference import TRIANGLE_BLOCK

COMMUNICATION = "nccl"
COMPILE_BLOCKS = True
LOGITS_BYTES = {2: 1 << 30, 4: 1 << 30, 8: 1 << 30}
OVERLAP_COMM = True
ZERO_KERNELS = True
TAKES_PARTS = True
SQUARES = 1024  # summed in fp32
KEPT = {"one_pass": 0, "statistics": 4, "logits_bytes": LOGITS_BYTES[2]}
DETERMINISTIC: dict[str, tuple[str, ...]] = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8")}
ENVIRONMENT_DEFAULTS: dict[str, str] = {}
SAVED_IN_SELECTIVE = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
OPTIMIZERS = ("torch", "apex")

# What torch does as well here as anything else.
add_weight_gradient = reference.add_weight_gradient
embedding = reference.embedding
know_documents = reference.know_documents
placement = reference.placement
linear = reference.linear
prepare_weight = reference.prepare_weight
prepare_layers = reference.prepare_layers
rotary = reference.rotary
swiglu = reference.swiglu
swiglu_halves = reference.swiglu_halves
whole_cross_entropy = reference.whole_cross_entropy

# Dense peak in TFLOP/s by the vendor's data sheets: (fp16 and bf16, fp32). The longest name that fits wins.
_PEAKS = {
    "V100": (125, 15.7),  # fp16 only
    "A10": (125, 31.2),
    "A10G": (70, 31.2),
    "A30": (165, 10.3),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
    "H20": (148, 44),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H200 NVL": (835, 60),
    "H100": (989, 67),
    "H800": (989, 67),
    "H200": (989, 67),
    "GH200": (989, 67),
    "B200": (2250, 75),
}

_FP8_CAPABILITY = (8, 9)

attention_kind = common.fused_or_same


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
    """As `reference.attention`; "fused" is torch's flash, cuDNN or memory-efficient kernel."""
    return common.attention(
        q,
        k,
        v,
        kind=kind,
        documents=documents,
        start=start,
        block=block,
        fused=common.sdpa,
        triangle_block=common.narrow_attention,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`, in one kernel; it rounds once where the definition rounds twice."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def prepare_generation() -> None:
    """As `reference.prepare_generation`: without cuDNN's attention, which plans anew for every length.

    Its plans are kept by all sizes, and keys grow by one with every token: 23 to 37 ms of the host each, by a
    public note on torch 2.13. Flash attention plans nothing.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def step_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """As `reference.step_linear`; int8 times one row is compiled and reads each weight once, as one byte.

    The definition, which several rows still take, writes the matrix in x's dtype and reads that: 5 bytes a
    weight. torch's `_weight_int8pack_mm` gives each output to one thread, and neighbours read K bytes apart.
    """
    if scale is None or len(x) != 1 or not _compiles():
        return reference.step_linear(x, weight, scale)
    return _compiled(int8_row_, True)(x, weight, scale)


def int8_row_(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The product of one row, x (1, K), int8 (N, K) and fp32 scale (N,), as one reduction; sums in fp32."""
    return ((weight.float() * x.float()).sum(dim=1) * scale).to(x.dtype)[None]


def step_attention(qkv: Tensor, kv: Tensor, rows: reference.StepRows) -> Tensor:
    """As `reference.step_attention`, by torch's fused attention."""
    return common.step_attention(qkv, kv, rows, rotary)


def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float = 0.0, gradient: bool = True
) -> Tensor:
    """As `reference.cross_entropy_`, compiled: one pass over the logits for the sum, one for the gradient."""
    return _compiled(loss_, False)(logits, labels, scale, z_loss, gradient)


def loss_(logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float, gradient: bool) -> Tensor:
    """`reference.cross_entropy_` in a form that compiles to two kernels, without a scatter."""
    index, scale = labels[:, None], scale[:, None]
    x = reference.upcast(logits)
    lse = torch.logsumexp(x, dim=1, keepdim=True)
    losses = lse - x.gather(1, index) + z_loss * lse.square()
    if gradient:
        grad_logits = (x - lse).exp() * (scale * (1 + 2 * z_loss * lse))
        hit = torch.arange(x.shape[1], device=x.device)[None] == index
        logits.copy_(grad_logits - torch.where(hit, scale.to(x.dtype), 0.0))
    return losses[:, 0]


def square_sum(pieces: Iterable[Tensor]) -> Tensor:
    """As `reference.square_sum`, compiled: one read of each piece; short sums in fp32, their sum in fp64."""
    rows, rests = _compiled(square_sum_, True), []
    sums = []
    for piece in pieces:
        flat = piece.view(-1)
        whole = flat.numel() // SQUARES * SQUARES
        if whole:
            sums.append(rows(flat[:whole]))
        rests.append(flat[whole:])
    return reference.square_sum(rests) + torch.stack(sums).sum() if sums else reference.square_sum(rests)


def square_sum_(x: Tensor) -> Tensor:
    """The sum of the squares of a flat x of a multiple of `SQUARES` numbers; fp64 is slow here."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.view(-1, SQUARES).square().sum(dim=1).sum(dtype=torch.float64)


def adamw_(
    weights: Tensor,
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """`reference.adamw` of one block, in a form that compiles to one kernel: 28 bytes a parameter in bf16.

    scalars: fp32 (4,) on the device: factor, 1 - lr * weight_decay, lr / (1 - beta1^t), sqrt(1 - beta2^t).
    """
    factor, keep, rate, root = scalars.unbind()
    grad = gradient.to(master.dtype) * factor
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    master.mul_(keep).sub_(rate * exp_avg / (exp_avg_sq.sqrt() / root + eps))
    weights.copy_(master)


def adamw(
    blocks: Iterable[reference.AdamBlock], step: Tensor, settings: dict[str, Any], factor: float | Tensor
) -> None:
    """As `reference.adamw`, one kernel a block, rounded in another order; nothing is read from the device."""
    beta1, beta2 = settings["betas"]
    steps, rate = step.double(), settings["lr"]
    scalars = torch.empty(4, dtype=torch.float64, device=step.device)
    scalars[0] = factor
    scalars[1] = 1 - rate * settings["weight_decay"]
    scalars[2] = rate / (1 - beta1**steps)
    scalars[3] = (1 - beta2**steps).sqrt()
    scalars = scalars.float()
    kernel = _compiled(adamw_, True)
    for block in blocks:
        kernel(*block, scalars, beta1, beta2, settings["eps"])


def _compiles() -> bool:
    """Whether there is a GPU and what compiles for it."""
    return torch.cuda.is_available() and common.find("triton", "jit") is not None


@lru_cache(maxsize=8)
def _compiled(function: Callable, dynamic: bool) -> Callable:
    """`function` compiled for the GPU; itself where there is no GPU or no triton. dynamic: of any size."""
    if not _compiles():
        return function
    return torch.compile(function, dynamic=dynamic)


def optimizer_kind(asked: str = "auto") -> str:
    """torch's fused AdamW; NVIDIA's apex when asked for."""
    return "torch" if asked == "auto" else asked


def optimizer(
    kind: str, params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW. Raises `UserError` for a kind that cannot be built here.

    apex means NVIDIA's, built from source: the package of that name on the registry is another project.
    """
    kind = optimizer_kind(kind)
    if kind == "torch":
        return common.torch_adamw(params, lr, betas, eps, weight_decay)
    fused_adam = common.find("apex.optimizers", "FusedAdam") if kind == "apex" else None
    if fused_adam is None:
        raise common.refuse_optimizer(kind, optimizers_here())
    return fused_adam(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adam_w_mode=True)


def optimizers_here() -> tuple[str, ...]:
    """The optimizers that this machine's packages really offer."""
    has_apex = common.find("apex.optimizers", "FusedAdam") is not None
    return tuple(kind for kind in OPTIMIZERS if kind != "apex" or has_apex)


@contextmanager
def profiling(stem: Path) -> Iterator[torch.profiler.profile]:
    """As `reference.profiling`; and `stem`.memory.pickle, each allocation with its place in the code."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        with reference.profiling(stem) as profile:
            yield profile
            torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def device_count() -> int:
    """GPUs that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def set_device(local_rank: int) -> torch.device:
    """Makes the rank's GPU the current one. Raises `ValueError` when there are fewer."""
    if local_rank >= device_count():
        raise ValueError(f"local rank {local_rank} has no GPU: {device_count()} are visible")
    common.set_defaults(ENVIRONMENT_DEFAULTS)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


make_deterministic = partial(common.make_deterministic, DETERMINISTIC)
allocate_compactly = common.allocate_compactly


def device_name() -> str:
    """The GPU as its vendor calls it."""
    return torch.cuda.get_device_name()


def supported_precisions() -> tuple[str, ...]:
    """bf16 needs an Ampere or later."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return ("bf16", "fp16", "fp32") if bf16 else ("fp16", "fp32")


def fp8_support() -> str:
    """As `reference.fp8_support`; its products need an Ada, a Hopper or later."""
    if not torch.cuda.is_available():
        return "no GPU is visible; float8 products need one of compute capability 8.9 or later"
    return fp8_support_of(device_name(), torch.cuda.get_device_capability())


def fp8_support_of(name: str, capability: tuple[int, int]) -> str:
    """`fp8_support` for a GPU of that name and compute capability."""
    if capability < _FP8_CAPABILITY:
        major, minor = capability
        return (
            f"{name} has compute capability {major}.{minor}, and float8 products need 8.9 or later (L40S, "
            "H100, H200, B200 ...); say fp8: false"
        )
    return fp8.problem() or fp8.NATIVE


def convert_to_fp8(layers: nn.Module, recipe: str) -> None:
    """As `reference.convert_to_fp8`, with the device's own products."""
    fp8.convert(layers, recipe, emulate=False)


def memory_gib() -> float:
    """Peak memory that torch has held on this device, in GiB."""
    return torch.cuda.max_memory_reserved() / 2**30


def peak_flops(dtype: torch.dtype) -> float | None:
    """Dense peak of this device in FLOP/s by its data sheet; None when its name is not known here."""
    return peak_flops_of(device_name(), dtype)


def peak_flops_of(name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of a device of that name."""
    known = max((key for key in _PEAKS if key in name), key=len, default=None)
    if known is None or (known == "V100" and dtype == torch.bfloat16):
        return None
    return _PEAKS[known][dtype == torch.float32] * 1e12


def synchronize() -> None:
    """Waits until the device has done what it was given."""
    torch.cuda.synchronize()


def kernels() -> dict[str, str]:
    """What runs each operation on this device, in words."""
    return {
        "attention": "torch SDPA (flash, cuDNN or memory-efficient)",
        "rms_norm": "torch, fused",
        "rotary": "torch",
        "swiglu": "torch",
        "cross_entropy": "torch, compiled" if common.find("triton", "jit") else "torch",
        "optimizer": "AdamW, compiled" if common.find("triton", "jit") else "torch AdamW, fused",
    }
