"""torch_npu's operators on the CPU: its real schemas (2.13.0), kernels of the documented meaning.

Wrong keywords, swapped arguments and wrong types are refused by the schema; gradients come from the plain
torch inside. Where torch_npu itself is loaded these must not be defined: `test_npu_wheel.py` uses a process
of its own, and compares these schemas with the real ones.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

SCHEMAS = {
    "npu_fusion_attention": (
        "(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
        "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, "
        "bool gen_mask_parallel=True, bool sync=False, str softmax_layout='', Tensor? sink=None, "
        "Tensor? dropout_mask=None, int seed=0, int offset=0) "
        "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
    ),
    "npu_scaled_masked_softmax": (
        "(Tensor x, Tensor mask, Scalar scale=1, bool fixed_triu_mask=False) -> Tensor"
    ),
    "npu_rms_norm": "(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_rotary_mul": (
        "(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor"
    ),
    "npu_swiglu": "(Tensor input, int dim=-1) -> Tensor",
    "npu_cross_entropy_loss": (
        "(Tensor input, Tensor target, Tensor? weight=None, str reduction='mean', int ignore_index=-100, "
        "float label_smoothing=0., float lse_square_scale_for_zloss=0., bool return_zloss=False) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
_library: torch.library.Library | None = None


def define() -> None:
    """Defines the operators, once in a process."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("npu", "DEF")
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, globals()[name.removeprefix("npu_")], "CompositeImplicitAutograd")


def fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    *rest,
):
    """Layouts BSND and TND; without `atten_mask` every query sees every key, whatever `sparse_mode` says.

    Beside the output each softmax's greatest score and sum, eight times: (B, heads, S, 8) or (T, heads, 8).
    """
    assert query.dtype == key.dtype == value.dtype
    assert head_num == query.shape[-2]
    settings = (atten_mask, scale, sparse_mode)
    if input_layout == "TND":
        parts, begin, key_begin = [], 0, 0
        for end, key_end in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
            k, v = (x[None, key_begin:key_end] for x in (key, value))
            parts.append(_attend(query[None, begin:end], k, v, *settings))
            begin, key_begin = end, key_end
        out, greatest, total = (torch.cat(found, dim=1)[0] for found in zip(*parts, strict=True))
    else:
        assert input_layout == "BSND"
        out, greatest, total = _attend(query, key, value, *settings)
        greatest, total = greatest.transpose(1, 2), total.transpose(1, 2)
    greatest, total = (x[..., None].expand(*x.shape, 8).contiguous() for x in (greatest, total))
    return out.contiguous(), greatest, total, query.new_empty(0), 0, 0, 0


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, mode: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, S, H, D), and each softmax's greatest score and sum (B, S, H)."""
    rows, keys = q.shape[1], k.shape[1]
    if mask is not None and mode in (2, 3):
        assert mask.shape == (2048, 2048)
        assert torch.equal(mask, torch.ones_like(mask).triu(diagonal=1))
        mask = torch.ones(rows, keys, dtype=torch.bool).triu(diagonal=1 if mode == 2 else 1 + keys - rows)
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(mask.bool(), float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), v.repeat_interleave(groups, 2))
    greatest = scores.detach().amax(-1)
    total = (scores.detach() - greatest[..., None]).exp().sum(-1)
    return out, greatest.transpose(1, 2), total.transpose(1, 2)


def scaled_masked_softmax(x, mask, scale=1, fixed_triu_mask=False):
    """Hidden scores become -10000, as documented."""
    assert not fixed_triu_mask
    return (x.float() * scale).masked_fill(mask, -10000.0).softmax(-1).to(x.dtype)


def rms_norm(input, gamma, epsilon=1e-6):
    """gamma has the input's dtype."""
    assert gamma.dtype == input.dtype
    rstd = torch.rsqrt(input.float().square().mean(-1, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


def rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    """4-D, even last dimension under 896; the angles are spread over heads."""
    assert input.dim() == r1.dim() == r2.dim() == 4
    assert r1.shape[0] == 1
    assert input.dtype == r1.dtype == r2.dtype
    assert rotary_mode == "interleave"
    x, cos, sin = (_wide(t) for t in (input, r1, r2))
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(input.dtype)


def swiglu(input, dim=-1):
    """The first half is the gate."""
    gate, up = _wide(input).chunk(2, dim=dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def _wide(x: Tensor) -> Tensor:
    """As kernels compute within: fp16 and bf16 in fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy_loss(
    input,
    target,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale_for_zloss=0.0,
    return_zloss=False,
):
    """Loss and log-probabilities; the z-loss outputs stay empty unless asked for."""
    assert (weight, ignore_index, label_smoothing, lse_square_scale_for_zloss, return_zloss) == (
        None,
        -100,
        0.0,
        0.0,
        False,
    )
    log_probabilities = torch.log_softmax(_wide(input), -1)
    loss = torch.nn.functional.nll_loss(log_probabilities, target, reduction=reduction)
    nothing = input.new_empty(0)
    return loss.to(input.dtype), log_probabilities.to(input.dtype), nothing, nothing


# ---- as the device launches them -------------------------------------------------------------------------


def _differentiate(function: Callable, inputs: tuple, slope: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function` with respect to its inputs, from within a kernel, where autograd is off."""

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = function(*leaves)
        return torch.autograd.grad(out, leaves, slope)

    return _elsewhere.submit(run).result()


_elsewhere = ThreadPoolExecutor(1)


def fusion_attention_grad(query, key, value, dy, head_num, input_layout, **options):
    """Of `fusion_attention`, with its options."""
    kept = ("atten_mask", "actual_seq_qlen", "actual_seq_kvlen", "sparse_mode")
    chosen = {name: options[name] for name in kept if name in options}

    def attend(q, k, v):
        scale = options.get("scale_value", 1.0)
        return fusion_attention(q, k, v, head_num, input_layout, scale=scale, **chosen)[0]

    nothing = query.new_empty(0)
    slopes = _differentiate(attend, (query, key, value), dy)
    return (*(slope.contiguous() for slope in slopes), nothing, nothing)


def rms_norm_backward(dy, self, gamma, rstd, **options):
    """Of x rstd gamma, rstd = (mean(x^2) + eps)^-1/2."""
    x, slope, rstd = self.float(), dy.float(), rstd.float()
    normed = x * rstd
    inner = slope * gamma.float()
    dx = rstd * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    dgamma = (slope * normed).flatten(0, -2).sum(0)
    return dx.to(self.dtype), dgamma.to(gamma.dtype)


def rotary_mul_backward(grad, self, r1, r2, rotary_mode="half", *rest, **options):
    """Of x and, as zeros, of the angles, which nobody asks for."""
    (dx,) = _differentiate(lambda x: rotary_mul(x, r1, r2, rotary_mode), (self,), grad)
    return dx, torch.zeros_like(r1), torch.zeros_like(r2)


def swiglu_backward(grad_output, self, dim=-1):
    """Of both halves."""
    return _differentiate(lambda x: swiglu(x, dim), (self,), grad_output)[0]


def scaled_masked_softmax_backward(y_grad, y, mask, scale, fixed_triu_mask=False):
    """Of the scores; none for a hidden one."""
    p, slope = y.float(), y_grad.float()
    dx = p * (slope - (slope * p).sum(-1, keepdim=True))
    return (dx.masked_fill(mask, 0) * scale).to(y.dtype)


def cast(x, dtype):
    return x.to(dtype)


def matmul_backward(grad, self, other, mask):
    leaves = tuple(x for x, wanted in zip((self, other), mask, strict=True) if wanted)

    def product(*chosen):
        given = iter(chosen)
        return torch.matmul(*(next(given) if w else x for x, w in zip((self, other), mask, strict=True)))

    found = iter(_differentiate(product, leaves, grad))
    return tuple(next(found) if wanted else None for wanted in mask)


def linear_backward(self, grad_output, weight, mask):
    dx = grad_output @ weight if mask[0] else None
    slope, x = grad_output.flatten(0, -2), self.flatten(0, -2)
    return dx, slope.t() @ x if mask[1] else None, slope.sum(0) if mask[2] else None


def repeat_interleave_backward(grad, input_grad, repeats, dim=None):
    return _differentiate(lambda x: x.repeat_interleave(repeats, dim), (input_grad,), grad)[0]


LAUNCHED: dict[str, Callable] = {
    "npu::npu_fusion_attention": fusion_attention,
    "npu::npu_fusion_attention_grad": fusion_attention_grad,
    "npu::npu_rms_norm": rms_norm,
    "npu::npu_rms_norm_backward": rms_norm_backward,
    "npu::npu_rotary_mul": rotary_mul,
    "npu::npu_rotary_mul_backward": rotary_mul_backward,
    "npu::npu_swiglu": swiglu,
    "npu::npu_swiglu_backward": swiglu_backward,
    "npu::npu_cross_entropy_loss": cross_entropy_loss,
    "npu::npu_scaled_masked_softmax": scaled_masked_softmax,
    "npu::npu_scaled_masked_softmax_backward": scaled_masked_softmax_backward,
    "npu::npu_dtype_cast": cast,
    "npu::_npu_dtype_cast": cast,
    "npu::npu_dtype_cast_backward": cast,
    "npu::_npu_dtype_cast_backward": cast,
    "npu::repeat_interleave_backward_int": repeat_interleave_backward,
    "npu::npu_format_cast": lambda x, *format: x,
    "npu::npu_format_cast_": lambda x, *format: x,
    "aten::matmul_backward": matmul_backward,
    "aten::linear_backward": linear_backward,
}
"""The kernel of every operator whose arithmetic the CPU's torch does not have."""
