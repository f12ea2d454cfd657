"""A partition's gradients are gone through in blocks, in order."""

import torch

from aquila.training.deepspeed import zero_step
from aquila.training.deepspeed.zero_step import blocks


def test_blocks_cover_a_partition_in_order(monkeypatch):
    monkeypatch.setitem(zero_step.BLOCK, "cpu", 4)
    pieces = [torch.arange(6.0).view(2, 3), torch.arange(6.0, 7.0), torch.arange(7.0, 15.0)]
    found = list(blocks(pieces))
    assert torch.equal(torch.cat([block for block, _ in found]), torch.arange(15.0))
    assert [start for _, start in found] == [0, 4, 6, 7, 11]
