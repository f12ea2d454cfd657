"""The documented limits of torch_npu's operators are checked, one by one, before they are called."""

import npu_kernels
import pytest
import torch

from aquila.backend import npu, reference

MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(diagonal=1)


@pytest.fixture(autouse=True)
def _operators():
    npu_kernels.define()


def qkv(seq=8, heads=4, kv_heads=2):
    return [torch.randn(1, seq, h, 16) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "XYZ"}, "'XYZ' is not one of BSND, TND"),
        ({"atten_mask": None}, "sparse_mode is ignored"),
        ({"atten_mask": MASK.float()}, "must be bool or uint8"),
        ({"atten_mask": MASK[:512, :512]}, "needs a 2048 x 2048 mask"),
        ({"ends": [8]}, "belong to layout TND"),
    ],
)
def test_limits_of_the_fused_kernel(changes, message):
    with pytest.raises(ValueError, match=message):
        npu.fusion_attention(*qkv(), **{"layout": "BSND", "atten_mask": MASK, "sparse_mode": 3, **changes})


def test_query_heads_must_be_a_multiple_of_key_heads():
    with pytest.raises(ValueError, match="no multiple"):
        npu.fusion_attention(*qkv(heads=4, kv_heads=3), layout="BSND", atten_mask=MASK, sparse_mode=3)


@pytest.mark.parametrize("ends", [[3, 7], [3, 3, 8], [5, 3, 8]])
def test_packed_lengths_must_rise_to_the_whole(ends):
    q, k, v = (x[0] for x in qkv())
    with pytest.raises(ValueError, match="must rise to 8"):
        npu.fusion_attention(q, k, v, layout="TND", atten_mask=MASK, sparse_mode=3, ends=ends)


def test_limits_of_the_softmax_kernel():
    x = torch.randn(1, 1, 32, 64)
    with pytest.raises(ValueError, match="must be bool"):
        npu.scaled_masked_softmax(x, torch.zeros(1, 1, 32, 64), 1.0)
    for shape in ((1, 1, 16, 64), (1, 1, 32, 4128), (1, 1, 32, 70)):
        with pytest.raises(ValueError, match="32 to 4096, in steps of 32"):
            npu.scaled_masked_softmax(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), 1.0)


def test_limits_of_the_rotary_kernel():
    table = torch.zeros(1, 1, 448)
    with pytest.raises(ValueError, match="even and under 896"):
        npu.rotary(torch.zeros(1, 1, 1, 896), table, table)


def test_the_triangle_block_must_suit_the_softmax_kernel():
    with pytest.raises(ValueError, match="multiple of 32"):
        npu.attention(*qkv(), kind="triangle", block=100)


def test_beyond_the_softmax_kernel_the_triangle_goes_on_in_plain_torch(monkeypatch):
    monkeypatch.setattr(npu, "_SOFTMAX_MAX", 128)
    q, k, v = qkv(seq=300)
    got = npu.attention(q, k, v, kind="triangle", block=64)
    assert (got - reference.attention(q, k, v, kind="reference")).abs().max() < 1e-5


def test_document_ends_count_rows_laid_end_to_end():
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 2]])
    assert npu.document_ends(documents) == [2, 4, 8, 9, 10, 12]
    assert npu.document_ends(documents) is npu.document_ends(documents)


def test_without_torch_npu_there_is_no_device():
    assert npu.device_count() == 0
    with pytest.raises(ValueError, match="0 are visible"):
        npu.set_device(0)
