"""ZeRO-1 and ZeRO-2's step without copies of the whole gradient.

DeepSpeed joins a rank's gradients into one tensor, casts it to fp32, scales it, steps and casts the weights
back: each a pass over memory, and 4 bytes a parameter more at the fullest moment. Here a block after the
other goes through all of that while it is in the cache. Norm and overflow are one pass, in which the norm
shows the overflow; DeepSpeed makes three, one of them over an fp64 copy. A world of one reduces nothing.

Same arithmetic, same order: the weights are, bit for bit, those of DeepSpeed's own step, with three
exceptions. Where gradients are clipped, the norm's last digits enter, and ours is summed in another order.
In fp16, on a step that raises the loss scale, DeepSpeed divides by the raised scale, which halves the
gradient; here gradients are divided by the scale that the loss was multiplied by. And on CPUs the mean over
ranks is rounded once (`gradient_exchange.py`), not once for each rank.

Frozen: the order of operations on each element. Free: blocks and everything around them.
Guarded by: tests/integration/test_blockwise_step.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aquila.backend import get_backend
from aquila.training.deepspeed.gradient_exchange import Exchange, can_exchange
from aquila.training.nonfinite import GradientCheck

BLOCK = {"cpu": 1 << 19}
"""Elements a block: with master weights and both moments within two cores' caches."""
LARGE_BLOCK = 1 << 26
"""On other devices: few launches, little memory."""


def step_in_use(zero: Any) -> str:
    """blockwise, or deepspeed: whose step the optimizer takes."""
    return "blockwise" if isinstance(getattr(zero.step, "__self__", None), BlockwiseStep) else "deepspeed"


def why_not(zero: Any) -> str | None:
    """Why DeepSpeed's ZeRO-1/2 optimizer must keep its own step, or None where it need not."""
    if zero.cpu_offload:
        return "the optimizer is offloaded"
    if not (isinstance(zero.optimizer, torch.optim.AdamW) and zero.optimizer.defaults.get("fused")):
        return "the optimizer is not torch's fused AdamW"
    # In fp32 DeepSpeed looks at the norm alone, which shows an overflow as well.
    checked = zero.check_grad_overflow or zero.dtype != torch.bfloat16
    plain = checked and zero.compute_grad_norm and not zero.has_moe_layers and not zero.zenflow
    return None if plain else "deepspeed.json asks for what it cannot do"


def use_blockwise_step(zero: Any, check: GradientCheck) -> bool:
    """Gives DeepSpeed's ZeRO-1/2 optimizer the step of this file; returns whether `check` sees gradients.

    Only where `why_not` has no reason against it. On CPUs the ranks' gradients are averaged by `Exchange`,
    which looks at them, too.
    """
    zero.step = BlockwiseStep(zero, zero.step).step
    groups = range(len(zero.bit16_groups))
    kept_as_they_are = not (
        zero.use_grad_accum_attribute or any(map(zero._use_compact_grad_partition_buffer, groups))
    )
    alone = dist.get_world_size(zero.dp_process_group) == 1
    if not kept_as_they_are or not (alone or can_exchange(zero)):
        return False
    # Gradients stay where autograd made them: no bucket to copy into.
    zero.process_gradients = zero.reduce_ready_partitions_and_remove_grads = lambda param, group: None
    zero.reduce_ipg_grads = (lambda comm_dtype=None: None) if alone else Exchange(zero, check)
    return not alone


class BlockwiseStep:
    """Norm, clipping and AdamW over the averaged gradients that a ZeRO optimizer holds."""

    def __init__(self, zero: Any, original_step: Any) -> None:
        self.zero, self.original_step = zero, original_step
        self.backend = get_backend(torch.device(zero.device).type)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """As `DeepSpeedZeroOptimizer.step`."""
        zero = self.zero
        norm = self._norm()
        if not norm.isfinite():
            # Bad gradients are dropped, and the loss scale falls, by DeepSpeed's own hand.
            self.original_step()
            return
        zero.micro_step_id = -1
        zero.overflow = False
        scale = zero.loss_scale
        zero._update_scale(False)
        zero._global_grad_norm = norm / scale
        factor = self._factor(norm, scale)
        for group in range(len(zero.bit16_groups)):
            zero.free_grad_in_param_list(zero.params_not_in_partition[group])
            self._step_group(group, factor)
            zero.free_grad_in_param_list(zero.params_in_partition[group])
            zero._release_preflattened_grad_buffers(group)
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        zero._lazy_init_hp_params_optimizer_state()
        self._gather()

    def _norm(self) -> Tensor:
        """Norm of the scaled gradients of all ranks, fp32; not finite when any of them is not."""
        held = self.zero.averaged_gradients.values()
        total = self.backend.square_sum(block for gradients in held for block, _ in blocks(gradients))
        # fp32, as DeepSpeed sends it: not every communication library sums fp64.
        total = total.to(self.zero.device, torch.float32)
        dist.all_reduce(total, group=self.zero.dp_process_group)
        return total.sqrt()

    def _factor(self, norm: Tensor, scale: float) -> float | Tensor:
        """What the gradients are multiplied by: unscaling and clipping, as DeepSpeed rounds them.

        It stays on the device: nobody waits for it.
        """
        if self.zero.clip_grad == 0.0:
            return 1.0 / scale
        clip = torch.clamp((norm / scale + 1e-6) / self.zero.clip_grad, min=1.0)
        return 1.0 / (clip * scale)

    def _step_group(self, group: int, factor: float | Tensor) -> None:
        zero = self.zero
        master = zero.single_partition_of_fp32_groups[group]
        rank = dist.get_rank(zero.real_dp_process_group[group])
        weights = zero.parallel_partitioned_bit16_groups[group][rank]
        settings = zero.optimizer.param_groups[group]
        state = adamw_state(zero.optimizer, master)
        state["step"] += 1
        flat = weights.data, master.data, state["exp_avg"], state["exp_avg_sq"]

        def parts() -> Iterator[tuple[Tensor, ...]]:
            for gradient, start in blocks(zero.averaged_gradients[group]):
                w, m, first, second = (x[start : start + gradient.numel()] for x in flat)
                yield w, m, gradient, first, second

        self.backend.adamw(parts(), state["step"], settings, factor)

    def _gather(self) -> None:
        """Every rank's part of the new weights, to every rank."""
        zero, under_way = self.zero, []
        for group, whole in enumerate(zero.bit16_groups_flat):
            ranks = zero.real_dp_process_group[group]
            if dist.get_world_size(ranks) > 1:
                part = zero.parallel_partitioned_bit16_groups[group][dist.get_rank(ranks)]
                under_way.append(dist.all_gather_into_tensor(whole, part, group=ranks, async_op=True))
        for gathering in under_way:
            gathering.wait()


def adamw_state(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a flat partition, made as torch makes it at the first step."""
    state = optimizer.state[master]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
    return state


def blocks(gradients: list[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Flat pieces of at most a block each, and where each stands in the partition."""
    start = 0
    for gradient in gradients:
        flat = gradient.detach().reshape(-1)
        size = BLOCK.get(flat.device.type, LARGE_BLOCK)
        for first in range(0, flat.numel(), size):
            yield flat[first : first + size], start + first
        start += flat.numel()
