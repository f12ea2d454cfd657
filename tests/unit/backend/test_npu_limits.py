"""Protects: the table of documented limits refuses what lies beyond each, and takes what a 7B run asks."""

import pytest
import torch

from aquila.backend.npu_limits import SIZES, check

BF16 = torch.bfloat16
MASK = torch.empty(2048, 2048, dtype=torch.bool, device="meta")


def of(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(changes: dict, q=(2, 2048, 32, 128), kv=(2, 2048, 32, 128)) -> None:
    options = {"atten_mask": MASK, "sparse_mode": 3, "head_num": q[-2], "input_layout": "BSND", **changes}
    check("npu_fusion_attention", of(*q), of(*kv), of(*kv), **options)


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({}, {}, None),
        ({}, {"q": (2, 128, 64, 128), "kv": (2, 4096, 8, 128)}, None),
        ({"input_layout": "XYZ"}, {}, "'XYZ' is not one of BSND, TND"),
        ({"atten_mask": None}, {}, "sparse_mode is ignored"),
        ({"atten_mask": MASK.float()}, {}, "must be bool or uint8"),
        ({"atten_mask": MASK[:512, :512]}, {}, "needs a 2048 x 2048 mask"),
        ({"sparse_mode": 5}, {}, "sparse_mode 5 is not one of 0, 2, 3"),
        ({"sparse_mode": 0}, {}, None),
        ({"sparse_mode": 0, "atten_mask": MASK[:64]}, {}, r"atten_mask \(64, 2048\) is not one of"),
        ({"sparse_mode": 0, "atten_mask": MASK.expand(2, 1, -1, -1)}, {}, None),
        ({"actual_seq_qlen": [8], "actual_seq_kvlen": [8]}, {}, "belong to layout TND"),
        ({"head_num": 16}, {}, "no multiple"),
        ({}, {"kv": (2, 2048, 5, 128)}, "no multiple of 5"),
        ({}, {"kv": (2, 2048, 32, 64)}, "keys .* of queries"),
        ({}, {"q": (1, 8, 300, 16), "kv": (1, 8, 300, 16)}, "query heads 300; .* 1 to 256"),
        ({}, {"q": (1, 8, 2, 1024), "kv": (1, 8, 2, 1024)}, "head size 1024; .* 1 to 768"),
        ({}, {"q": (1, 1 << 21, 2, 8), "kv": (1, 1 << 21, 2, 8)}, "sequence 2097152"),
        ({}, {"q": (0, 8, 2, 8), "kv": (0, 8, 2, 8)}, "batch 0"),
    ],
)
def test_attention(changes, shapes, message) -> None:
    if message is None:
        return attention(changes, **shapes)
    with pytest.raises(ValueError, match=f"^npu_fusion_attention: .*{message}"):
        attention(changes, **shapes)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([3, 8], None),
        ([3, 7], "must rise to 8"),
        ([3, 3, 8], "must rise to 8"),
        ([5, 3, 8], "must rise to 8"),
        (list(range(1, 1026)), "packed documents 1025; .* 1 to 1024"),
        ([1 << 21], "packed tokens 2097152"),
    ],
)
def test_packed_attention(ends, message) -> None:
    tokens = ends[-1] if message and "rise" not in message else 8
    q = (tokens, 4, 16)
    changes = {"input_layout": "TND", "actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    if message is None:
        return attention(changes, q, q)
    with pytest.raises(ValueError, match=message):
        attention(changes, q, q)


def test_one_dtype_for_all_tensors() -> None:
    x = of(1, 8, 2, 16)
    with pytest.raises(ValueError, match="the same for all its tensors, not bfloat16, float32, bfloat16"):
        check("npu_fusion_attention", x, x.float(), x, 2, "BSND")
    with pytest.raises(ValueError, match="not bfloat16, float32, float32"):
        check("npu_rotary_mul", x, of(1, 8, 1, 16).float(), of(1, 8, 1, 16).float(), "interleave")
    with pytest.raises(ValueError, match="not float64"):
        check("npu_swiglu", x.double())


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("npu_scaled_masked_softmax", (of(2, 32, 512, 2048), of(1, 1, 512, 2048) > 0), None),
        ("npu_scaled_masked_softmax", (of(1, 1, 32, 64), of(1, 1, 32, 64)), "must be bool"),
        ("npu_scaled_masked_softmax", (of(1, 1, 16, 64), of(16, 64) > 0), "rows 16; .* 32 to 4096 in step"),
        ("npu_scaled_masked_softmax", (of(1, 1, 32, 4128), of(32, 4128) > 0), "keys 4128"),
        ("npu_scaled_masked_softmax", (of(1, 1, 32, 70), of(32, 70) > 0), "keys 70"),
        ("npu_scaled_masked_softmax", (of(1, 1, 32, 64), of(2, 1, 32, 64) > 0), "does not spread over"),
        ("npu_rotary_mul", (of(2, 2048, 32, 128), of(1, 2048, 1, 128), of(1, 2048, 1, 128)), None),
        ("npu_rotary_mul", (of(32, 8, 32, 128), of(1, 8, 1, 128), of(1, 8, 1, 128)), "heads 1024; .* to 999"),
        ("npu_rotary_mul", (of(1, 8, 2, 896), of(1, 8, 1, 896), of(1, 8, 1, 896)), "size 896; .* 2 to 894"),
        ("npu_rotary_mul", (of(2, 8, 2, 16), of(2, 8, 1, 16), of(2, 8, 1, 16)), r"must be \(1, 8, 1, 16\)"),
        ("npu_rms_norm", (of(2, 2048, 4096), of(4096)), None),
        ("npu_rms_norm", (of(4096), of(4096)), "dimensions 1; .* 2 to 8"),
        ("npu_rms_norm", (of(2, 8), of(4)), "is not the end of"),
        ("npu_swiglu", (of(2, 2048, 22016),), None),
        ("npu_swiglu", (of(2, 7),), "width 7"),
        ("npu_swiglu", (of(8, 4).t(),), "must be contiguous"),
        ("npu_cross_entropy_loss", (of(500, 100008), of(500, dtype=torch.int64)), None),
        ("npu_cross_entropy_loss", (of(200_001, 8), of(200_001, dtype=torch.int64)), "tokens 200001"),
        ("npu_cross_entropy_loss", (of(5, 8), of(5, dtype=torch.int32)), "must be int64"),
    ],
)  # fmt: skip
def test_the_other_operators(operator, arguments, message) -> None:
    rest = {"npu_scaled_masked_softmax": (1.0, False), "npu_rotary_mul": ("interleave",)}.get(operator, ())
    if message is None:
        return check(operator, *arguments, *rest)
    with pytest.raises(ValueError, match=f"^{operator}: .*{message}"):
        check(operator, *arguments, *rest)


def test_spans_are_written_as_the_message_shows_them() -> None:
    assert str(SIZES["npu_rotary_mul"]["head size"]) == "2 to 894 in steps of 2"
    assert 4096 in SIZES["npu_scaled_masked_softmax"]["keys"]
    assert 4095 not in SIZES["npu_scaled_masked_softmax"]["keys"]
