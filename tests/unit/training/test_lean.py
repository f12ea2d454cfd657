"""The step without copies does the arithmetic of torch's AdamW over fp32 master weights, bit for bit."""

import pytest
import torch

from aquila.training import lean
from aquila.training.lean import adamw, blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_blocked_step_is_torchs_adamw_over_master_weights(dtype, monkeypatch):
    monkeypatch.setitem(lean.BLOCK, "cpu", 64)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(7, 31, generator=generator).to(dtype)
    expected = torch.nn.Parameter(weights.float().view(-1).clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([expected], fused=True, **options)
    master = expected.detach().clone()
    first, second, step = torch.zeros_like(master), torch.zeros_like(master), torch.zeros(())
    for _ in range(3):
        gradient = torch.randn(7, 31, generator=generator).to(dtype)
        kept = gradient.clone()
        expected.grad = gradient.float().view(-1) * 0.3
        optimizer.step()
        step += 1
        for block, start in blocks([gradient]):
            part = slice(start, start + block.numel())
            flat = weights.view(-1)[part]
            adamw(flat, master[part], block, (first[part], second[part], step), options, 0.3)
        assert dtype == torch.float32 or torch.equal(gradient, kept)
    assert torch.equal(master, expected.detach())
    assert torch.equal(weights.view(-1), expected.detach().to(dtype))


def test_blocks_cover_a_partition_in_order(monkeypatch):
    monkeypatch.setitem(lean.BLOCK, "cpu", 4)
    pieces = [torch.arange(6.0).view(2, 3), torch.arange(6.0, 7.0), torch.arange(7.0, 15.0)]
    found = list(blocks(pieces))
    assert torch.equal(torch.cat([block for block, _ in found]), torch.arange(15.0))
    assert [start for _, start in found] == [0, 4, 6, 7, 11]
