"""Protects: limits of operators kept, large inputs cut, chips and optimizers refused."""

import os

import pytest
import torch

from aquila.backend import detect, npu, npu_limits, reference
from aquila.core.errors import UserError
from tests.npu_simulator import kernels

MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(diagonal=1)


@pytest.fixture(autouse=True)
def _operators():
    kernels.define()


def qkv(seq=8, heads=4, kv_heads=2):
    return [torch.randn(1, seq, h, 16) for h in (heads, kv_heads, kv_heads)]


def test_every_operator_is_checked_before_it_is_called():
    x, table = torch.zeros(1, 1, 1, 896), torch.zeros(1, 1, 448)
    scores, labels = torch.zeros(1, 1, 16, 64), torch.zeros(2)
    calls = {
        "npu_fusion_attention": lambda: npu.fusion_attention(
            *qkv(), layout="BSND", atten_mask=None, sparse_mode=3
        ),
        "npu_scaled_masked_softmax": lambda: npu.scaled_masked_softmax(scores, scores > 1, 1.0),
        "npu_rotary_mul": lambda: npu.rotary(x, table, table),
        "npu_rms_norm": lambda: npu.rms_norm(torch.zeros(4), torch.ones(4), 1e-5),
        "npu_swiglu": lambda: npu.swiglu(x[..., :0], x[..., :0]),
        "npu_cross_entropy_loss": lambda: npu.cross_entropy_(torch.zeros(2, 5), labels, labels),
    }
    assert calls.keys() == npu_limits.CHECKS.keys() == npu_limits.SIZES.keys()
    for operator, call in calls.items():
        with pytest.raises(ValueError, match=f"^{operator}: "):
            call()


def test_more_rows_than_the_rotary_kernel_takes_are_turned_all_the_same():
    x = torch.randn(40, 3, 32, 8)
    cos, sin = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    torch.testing.assert_close(npu.rotary(x, cos, sin), reference.rotary(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_in_half_precision_is_near_to_one_in_fp32(dtype):
    """Angles are of positions and frequencies in fp32; their cos and sin are rounded once."""
    q, k = torch.randn(2, 1, 2048, 4, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.outer(torch.arange(2048.0), 10000 ** -(torch.arange(0, 128, 2) / 128))[None]
    tables = angles.cos(), angles.sin()

    def turn(backend, *given):
        return [backend.rotary(x, *tables) for x in given]

    def scores(pair):
        return torch.einsum("bqhd,bkhd->bhqk", *(x.double() for x in pair))

    truth = turn(reference, q.double(), k.double())
    ours, theirs = turn(npu, q, k), turn(reference, q, k)
    far = [sum((x - t).norm() for x, t in zip(pair, truth, strict=True)) for pair in (ours, theirs)]
    assert far[0] < 1.35 * far[1]
    far = [(scores(pair) - scores(truth)).norm() for pair in (ours, theirs)]
    assert far[0] < 1.35 * far[1]


def test_more_documents_than_the_fused_kernel_takes_go_in_several_calls():
    q, k, v = (torch.randn(1, 1500, 1, 4) for _ in range(3))
    documents = torch.arange(1500)[None]
    with pytest.raises(ValueError, match="packed documents 1500; its documents allow 1 to 1024"):
        npu.fusion_attention(
            *(x[0] for x in (q, k, v)),
            layout="TND",
            atten_mask=MASK,
            sparse_mode=3,
            ends=list(range(1, 1501)),
        )
    assert torch.equal(npu.attention(q, k, v, kind="fused", documents=documents), v)


@pytest.mark.parametrize("limit", [4096, 32])
def test_large_scores_do_not_leave_fp16(monkeypatch, limit):
    """Through the softmax kernel, and beyond its sizes: scores of 6000, 68000 before they are scaled."""
    monkeypatch.setattr(npu, "_SOFTMAX_KEYS", npu_limits.Span(32, limit, 32))
    q = torch.full((1, 64, 1, 128), 23.0, dtype=torch.float16)
    k, v = q + torch.rand_like(q), torch.randn(1, 64, 1, 128, dtype=torch.float16)
    assert (q.float() * k.float()).sum(-1).min() > 60000
    assert npu.attention(q, k, v, kind="triangle", block=32).isfinite().all()


def test_the_triangle_block_must_suit_the_softmax_kernel():
    with pytest.raises(ValueError, match="multiple of 32"):
        npu.attention(*qkv(), kind="triangle", block=100)


def test_beyond_the_softmax_kernel_the_triangle_goes_on_in_plain_torch(monkeypatch):
    monkeypatch.setattr(npu, "_SOFTMAX_KEYS", npu_limits.Span(32, 128, 32))
    q, k, v = qkv(seq=300)
    got = npu.attention(q, k, v, kind="triangle", block=64)
    assert (got - reference.attention(q, k, v, kind="reference")).abs().max() < 1e-5


def test_document_ends_count_rows_laid_end_to_end():
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 2]])
    assert npu.document_ends(documents) == [2, 4, 8, 9, 10, 12]
    assert npu.document_ends(documents) is npu.document_ends(documents)


def test_documents_that_came_from_the_host_are_not_asked_of_the_device():
    here, there = torch.tensor([[0, 0, 1]]), torch.zeros(1, 3, dtype=torch.int64)
    npu.know_documents(here, there)
    assert npu.document_ends(there[:]) == [2, 3]


def test_without_torch_npu_there_is_no_device():
    assert npu.device_count() == 0
    with pytest.raises(ValueError, match="0 are visible"):
        npu.set_device(0)


ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("kind", ["npu", "apex"])
def test_optimizers_that_keep_old_gradients_are_refused_by_name(kind):
    with pytest.raises(UserError, match=f"'{kind}' keeps the first step's gradients"):
        npu.optimizer(kind, [torch.nn.Parameter(torch.ones(2))], **ADAMW)


@pytest.mark.parametrize("chip", ["910", "910A", "910ProA", "910ProB", "910PremiumA", "910B"])
def test_chips_of_the_first_generation_are_refused_by_name(monkeypatch, chip):
    monkeypatch.setattr(npu, "device_name", lambda: f"Ascend{chip}")
    monkeypatch.setattr(npu, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "npu", type("", (), {"set_device": lambda rank: None}), raising=False)
    with pytest.raises(UserError, match=f"Ascend{chip} is of the first Ascend 910 generation"):
        npu.set_device(0)
    assert "bf16" not in npu.supported_precisions()
    assert npu.peak_flops(torch.bfloat16) is None


def test_the_environment_is_completed_and_the_users_word_stays(monkeypatch):
    for name in (*npu.ENVIRONMENT_DEFAULTS, "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(npu, "device_name", lambda: "Ascend910B3")
    monkeypatch.setattr(npu, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "npu", type("", (), {"set_device": lambda rank: None}), raising=False)
    monkeypatch.setattr(torch, "device", lambda *name: name)
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "0")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    npu.set_device(0)
    assert os.environ["TASK_QUEUE_ENABLE"] == "0"
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "1800"
    assert "PYTORCH_NPU_ALLOC_CONF" not in os.environ  # beside torch's own, or on an old driver, it ends runs


@pytest.mark.parametrize("chip", ["910B1", "910B2", "910B2C", "910B3", "910B4", "910B4-1", "910_9391"])
def test_later_chips_keep_bf16_and_their_peak(monkeypatch, chip):
    monkeypatch.setattr(npu, "device_name", lambda: f"Ascend{chip}")
    assert npu.supported_precisions()[0] == "bf16"
    assert npu.peak_flops(torch.bfloat16) == next(v for k, v in npu._PEAKS.items() if k in chip) * 1e12


def test_an_npu_that_answers_in_cudas_name_is_an_npu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(npu, "device_count", lambda: 1)
    assert detect() == "npu"
