"""A sample's positions divided among neighbouring ranks, in the way of Ulysses (arXiv 2309.14509).

Every part of a layer but attention looks at one position alone, so a rank holds S / N positions of each
sample. Around attention an all-to-all turns positions into heads: a rank then has all positions of H / N
heads, and any attention kernel runs as it is.

Shapes: N ranks of a group, B batch, S positions of a sample, s = S / N, H heads of one kind, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class SequenceShard:
    """What one rank of `size` neighbours holds of each sample: part number `rank` of its positions."""

    group: Any
    rank: int
    size: int

    def part(self, whole: Tensor) -> Tensor:
        """This rank's positions of `whole` (B, S, ...): (B, s, ...)."""
        length = whole.shape[1] // self.size
        return whole.narrow(1, self.rank * length, length)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, s, H, D) to (B, S, H / N, D), and k, v alike, each of the heads that these queries look at.

        Fewer key and value heads than ranks are sent to several: their gradients are summed.
        """
        repeats = max(1, self.size // k.shape[2])
        k, v = (x.repeat_interleave(repeats, 2) if repeats > 1 else x for x in (k, v))
        q, k, v = (_Exchange.apply(x, self, True) for x in (q, k, v))
        return q, k, v

    def to_positions(self, out: Tensor) -> Tensor:
        """(B, S, H / N, D) to (B, s, H, D)."""
        return _Exchange.apply(out, self, False)


class _Exchange(torch.autograd.Function):
    """Positions to heads, or heads to positions: each is the other's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, shard: SequenceShard, to_heads: bool) -> Tensor:
        ctx.shard, ctx.to_heads = shard, to_heads
        return _exchanged(x, shard, to_heads)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _exchanged(gradient, ctx.shard, not ctx.to_heads), None, None


def _exchanged(x: Tensor, shard: SequenceShard, to_heads: bool) -> Tensor:
    divided = x.unflatten(2 if to_heads else 1, (shard.size, -1))
    sent = divided.permute(2, 0, 1, 3, 4) if to_heads else divided.transpose(0, 1)  # (N, B, s, H / N, D)
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=shard.group)
    if to_heads:
        return received.transpose(0, 1).flatten(1, 2)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)
