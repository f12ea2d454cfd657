"""torch_npu's operators on the CPU: its real schemas (2.13.0), kernels of the documented meaning.

Wrong keywords, swapped arguments and wrong types are refused by the schema; gradients come from the plain
torch inside. Where torch_npu itself is loaded these must not be defined: `test_npu_wheel.py` uses a process
of its own, and compares these schemas with the real ones.
"""

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
    """Layouts BSND and TND; without `atten_mask` every query sees every key, whatever `sparse_mode` says."""
    assert query.dtype == key.dtype == value.dtype
    assert head_num == query.shape[-2]
    if input_layout == "TND":
        parts, begin = [], 0
        for end, key_end in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
            part = slice(begin, end)
            assert end == key_end
            q, k, v = (x[None, part] for x in (query, key, value))
            parts.append(_attend(q, k, v, atten_mask, scale, sparse_mode))
            begin = end
        out = torch.cat(parts, dim=1)[0]
    else:
        assert input_layout == "BSND"
        out = _attend(query, key, value, atten_mask, scale, sparse_mode)
    nothing = query.new_empty(0)
    return out, nothing, nothing, nothing, 0, 0, 0


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, mode: int) -> Tensor:
    rows, keys = q.shape[1], k.shape[1]
    if mask is not None and mode in (2, 3):
        assert mask.shape == (2048, 2048)
        assert torch.equal(mask, torch.ones_like(mask).triu(diagonal=1))
        mask = torch.ones(rows, keys, dtype=torch.bool).triu(diagonal=1 if mode == 2 else 1 + keys - rows)
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(mask.bool(), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), v.repeat_interleave(groups, 2))


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
    turned = torch.stack((-input[..., 1::2], input[..., 0::2]), dim=-1).flatten(-2)
    return input * r1 + turned * r2


def swiglu(input, dim=-1):
    """The first half is the gate."""
    gate, up = input.chunk(2, dim=dim)
    return torch.nn.functional.silu(gate) * up


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
    log_probabilities = torch.log_softmax(input, -1)
    loss = torch.nn.functional.nll_loss(log_probabilities, target, reduction=reduction)
    nothing = input.new_empty(0)
    return loss, log_probabilities, nothing, nothing
