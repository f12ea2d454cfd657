"""Which dtypes an operator takes on the AI cores of a 910B, by CANN's own sources; all else is the AI CPU's.

Read in CANN's open ops-math (commit c4193324) and ops-nn (e5c3fa93): of each operator the list that its
`op_api` compares with before it launches on the AI cores, for 910B where there are several. fp16, bf16 and
fp32 need no entry; everything else that a step meets must stand here. Not listed although they exist, for
where it runs depends on its shape as well: gather (GatherElements, of few rows alone); int64 masked_fill and
sorts of whole numbers are not on the AI cores at all.
"""

FLOATS = {"float16", "bfloat16", "float32"}
_ANY = {"int8", "int16", "int32", "int64", "uint8", "bool", *FLOATS}

ALLOWED = {
    # conversion/: fill, zero_op of math/, view_copy, concat_d and pack (no list narrower than this), triu and
    # tril (none at all: every launch is an AI core's)
    "aten::zeros": {"int32", "int64", "int8", "bool"},
    "aten::ones": {"int32", "int64", "int8", "bool"},
    "aten::zero_": {"int8", "int32", "int64", "uint8", "bool"},
    "aten::fill_.Scalar": {"int8", "int32", "int64", "bool"},
    "aten::clone": _ANY,
    "aten::copy_": _ANY,
    "aten::cat": _ANY,
    "aten::stack": _ANY,
    "aten::triu": {"bool"},
    "aten::tril": {"bool"},
    # math/cast: pairs, see `CASTS`
    # math/: range, equal, not_equal, less, select (its condition is bool), maximum, sub, add, mul, is_finite
    # (its result is bool), logical_or, logical_and, reduce_any, reduce_sum; bitwise ones of bool are logical,
    # greater_equal and less_equal as less
    "aten::arange": {"int32", "int64"},
    "aten::eq.Scalar": {"int32", "int64", "int8", "uint8", "bool"},
    "aten::eq.Tensor": {"int32", "int64", "int8", "uint8", "bool"},
    "aten::ne.Scalar": {"int32", "int64", "int8", "uint8", "bool"},
    "aten::ne.Tensor": {"int32", "int64", "int8", "uint8", "bool"},
    "aten::lt.Scalar": {"int32", "int64", "int8", "uint8", "bool"},
    "aten::le.Scalar": {"bool"},
    "aten::ge.Scalar": {"bool"},
    "aten::logical_and_": {"bool"},
    "aten::isnan": {"bool"},
    "aten::isfinite": {"bool"},
    "aten::where.self": {"bool", "int32", "int8", "uint8", "int64"},
    "aten::maximum": {"int32", "int8", "int64"},
    "aten::sub.Tensor": {"int64", "int32", "int8", "uint8", "bool"},
    "aten::add.Tensor": {"int64", "int32", "int8", "uint8", "bool"},
    "aten::add_.Tensor": {"int64", "int32", "int8", "uint8", "bool"},
    "aten::mul.Tensor": {"int64", "int32", "int8", "uint8", "bool"},
    "aten::logical_or": {"bool", "int8", "uint8", "int16", "int32", "int64"},
    "aten::any": {"bool"},
    "aten::sum": {"int32", "int64"},
    "aten::bitwise_not": {"bool"},
    "aten::bitwise_and.Tensor": {"bool"},
    "aten::bitwise_or.Tensor": {"bool"},
    # index/ of ops-nn: gather_v2 (rows by int64), index; embedding_dense_grad_v2 sorts indices as fp32 bits
    "aten::embedding": {"int32", "int64"},
    "aten::embedding_dense_backward": {"int32", "int64"},
    "aten::index.Tensor": {"int32", "int64", "bool"},
    # scatter_elements_v2: fp32 along the last dimension, of less than 1.2 million numbers in older releases
    "aten::scatter_add_": {"int64"},
    # masks and labels of torch_npu's own, by their documents (backend/npu_limits.py)
    "npu::npu_fusion_attention": {"bool", "uint8"},
    "npu::npu_fusion_attention_grad": {"bool", "uint8"},
    "npu::npu_scaled_masked_softmax": {"bool"},
    "npu::npu_scaled_masked_softmax_backward": {"bool"},
    "npu::npu_cross_entropy_loss": {"int64"},
}  # fmt: skip
CASTS = {
    (a, b) for a in _ANY for b in _ANY if a == b or "float32" in (a, b) or {a, b} <= {"int32", "int64"}
} | {(a, b) for a in FLOATS for b in FLOATS}
"""From and to, of those in math/cast that can occur here."""
NOT_COMPUTED = ("aten::_local_scalar_dense", "c10d::")
"""Copies to the host and between devices."""


def on_the_ai_cpu(name: str, dtypes: str) -> bool:
    """Whether a launch with tensors of these dtypes, joined by commas, leaves the AI cores."""
    met = dtypes.split(",")
    if name.startswith(NOT_COMPUTED) or name.endswith("to the host") or dtypes == "":
        return False
    if name == "aten::_to_copy":
        return len(met) > 1 and (met[0], met[1]) not in CASTS
    return not set(met) <= FLOATS | ALLOWED.get(name, set())
