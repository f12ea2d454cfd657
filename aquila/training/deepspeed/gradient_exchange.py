"""The mean of all ranks' gradients under ZeRO-1 and ZeRO-2, on CPUs: cores that communicate do not compute.

DeepSpeed copies each gradient into a bucket, sums the buckets of all ranks with bf16 in between, and throws
away what is not its own. Here every rank sends each other one its part of a gradient, and sums what it gets
in fp32: half the bytes, one rounding, and no work for each parameter while backward runs. DeepSpeed's own
way stays for devices, whose communication hides behind backward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aquila.training.nonfinite import GradientCheck

PIECE = 1 << 24
"""Elements of a partition at a time; what two pieces send and receive takes four times that for each rank."""


def can_exchange(zero: Any) -> bool:
    """Whether DeepSpeed's ZeRO optimizer is to do what `Exchange` does: a plain mean, in its own dtype."""
    plain = zero.postscale_gradients and zero.gradient_predivide_factor == 1.0
    return plain and zero.communication_data_type == zero.dtype and torch.device(zero.device).type == "cpu"


class Exchange:
    """In place of a ZeRO optimizer's `reduce_ipg_grads`, when its gradients still lie in their parameters."""

    def __init__(self, zero: Any, check: GradientCheck) -> None:
        self.zero, self.check = zero, check

    @torch.no_grad()
    def __call__(self, comm_dtype: None = None) -> None:
        """Makes this rank's part of each gradient the mean over all ranks."""
        under_way: list[Callable[[], None]] = []
        for group, params in enumerate(self.zero.round_robin_bit16_groups):
            size = int(self.zero.partition_size[group])
            places = self._places(params, self.zero.round_robin_bit16_padding[group])
            for first in range(0, size, PIECE):
                under_way.append(self._start(self.zero.real_dp_process_group[group], places, size, first))
                if len(under_way) == 2:  # one piece travels while the next is put together
                    under_way.pop(0)()
        for finish in under_way:
            finish()

    @staticmethod
    def _places(params: list[Tensor], paddings: list[int]) -> list[tuple[Tensor, int]]:
        """Each parameter's gradient, flat, and where it begins in the group's."""
        places, start = [], 0
        for param, padding in zip(params, paddings, strict=True):
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            places.append((param.grad.view(-1), start))
            start += param.numel() + padding
        return places

    def _start(
        self, ranks: Any, places: list[tuple[Tensor, int]], size: int, first: int
    ) -> Callable[[], None]:
        """Sends of each rank's partition of `size` elements a piece from `first` on; returns what ends it."""
        world, rank = dist.get_world_size(ranks), dist.get_rank(ranks)
        length = min(PIECE, size - first)
        sent = torch.empty(world, length, dtype=self.zero.dtype)
        received = torch.empty_like(sent)
        own: list[tuple[Tensor, slice]] = []
        for to in range(world):
            start, filled = to * size + first, 0
            for gradient, at in places:
                low, high = max(at, start), min(at + gradient.numel(), start + length)
                if low >= high:
                    continue
                part = gradient[low - at : high - at]
                sent[to, filled : low - start] = 0  # padding
                sent[to, low - start : high - start] = part
                filled = high - start
                if to == rank:
                    own.append((part, slice(low - start, high - start)))
            sent[to, filled:] = 0
        self.check.look(sent)
        travel = dist.all_to_all_single(received, sent, group=ranks, async_op=True)

        def finish() -> None:
            travel.wait()
            mean = received[0].float()
            for other in received[1:]:
                mean.add_(other)
            mean.div_(world)
            for part, where in own:
                part.copy_(mean[where])

        return finish
