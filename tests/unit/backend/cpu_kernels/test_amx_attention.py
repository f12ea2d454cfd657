"""Attention on matrix tiles is no further from the truth than torch's kernel, forward and backward."""

import pytest
import torch

from aquila.backend import common, reference
from aquila.backend.cpu_kernels.amx import attention as amx_attention

needs_tiles = pytest.mark.usefixtures("amx")
CASES = [  # batch, positions, heads, key heads, head size, documents a row
    (1, 2, 1, 1, 32, 1),
    (2, 63, 2, 1, 64, 1),
    (1, 64, 2, 2, 64, 3),
    (1, 65, 4, 2, 128, 1),
    (2, 200, 3, 3, 64, 9),
    (1, 513, 4, 1, 96, 40),
    (1, 256, 2, 2, 64, 256),
]


def case(batch, positions, heads, kv_heads, dim, documents):
    g = torch.Generator().manual_seed(positions)
    sizes = ((heads,), (kv_heads,), (kv_heads,), (heads,))
    *inputs, grad_output = [
        torch.randn(batch, positions, *size, dim, generator=g).bfloat16() for size in sizes
    ]
    starts = torch.rand(batch, positions, generator=g).argsort(1) < documents - 1
    return (
        [x.requires_grad_() for x in inputs],
        grad_output,
        starts.long().cumsum(1) if documents > 1 else None,
    )


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9)).item()


@needs_tiles
@pytest.mark.parametrize("sizes", CASES)
def test_it_is_as_near_to_the_truth_as_torch(sizes):
    inputs, grad_output, documents = case(*sizes)
    wide = [x.double() for x in inputs]
    truth = reference.plain_attention(*wide, documents=documents)
    truths = [truth, *torch.autograd.grad(truth, inputs, grad_output.double())]
    results = []
    for attend in (amx_attention.attention, common.sdpa):
        out = attend(*inputs, documents=documents, start=0)
        assert out.dtype == torch.bfloat16
        results.append([out, *torch.autograd.grad(out, inputs, grad_output)])
    for ours, torchs, wanted in zip(*results, truths, strict=True):
        assert ours.shape == wanted.shape
        assert error(ours, wanted) < max(1.2 * error(torchs, wanted), 4e-3)


@needs_tiles
@pytest.mark.parametrize("start", [1, 40, 64, 100])
def test_queries_behind_a_cache_see_their_past(start):
    g = torch.Generator().manual_seed(start)
    q = torch.randn(2, 70, 4, 64, generator=g).bfloat16()
    held = torch.randn(2, start + 90, 2, 64, generator=g).bfloat16()  # a cache with room: strides of its own
    k, v = held[:, : start + 70], held[:, 20:][:, : start + 70]
    documents = (torch.arange(start + 70) > start // 2).long().expand(2, -1)
    for masks in (None, documents):
        out = amx_attention.attention(q, k, v, masks, start)
        wide = (x.double() for x in (q, k, v))
        assert error(out, reference.plain_attention(*wide, documents=masks, start=start)) < 4e-3


@needs_tiles
def test_large_scores_do_not_overflow():
    inputs, grad_output, _ = case(1, 130, 2, 2, 64, 1)
    large = [(30 * x).detach().requires_grad_() for x in inputs]
    out = amx_attention.attention(*large, documents=None, start=0)
    truth = reference.plain_attention(*[x.double() for x in large])
    assert error(out, truth) < 1e-2
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, large, grad_output))


@needs_tiles
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_nan_is_not_hidden(where):
    inputs, grad_output, _ = case(1, 100, 2, 2, 64, 1)
    spoiled = [x.detach().clone() for x in inputs]
    spoiled["qkv".index(where)][0, 70, 1, 5] = float("nan")
    spoiled = [x.requires_grad_() for x in spoiled]
    out = amx_attention.attention(*spoiled, documents=None, start=0)
    assert out[0, :64].isfinite().all()  # its past, as far as blocks of 64 are concerned
    assert out[0, 70, 1].isnan().any()
    assert any(g.isnan().any() for g in torch.autograd.grad(out, spoiled, grad_output))


@needs_tiles
def test_the_number_of_threads_changes_no_bit():
    inputs, grad_output, documents = case(2, 200, 4, 2, 64, 5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = amx_attention.attention(*inputs, documents=documents, start=0)
            results.append([out, *torch.autograd.grad(out, inputs, grad_output)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_first_keys_are_where_documents_begin():
    documents = torch.tensor([[3, 3, 4, 4, 4], [0, 1, 2, 2, 3]])
    assert amx_attention.first_keys(documents).tolist() == [[0, 0, 2, 2, 2], [0, 1, 2, 2, 4]]
