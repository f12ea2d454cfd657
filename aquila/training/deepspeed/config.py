"""What DeepSpeed and the optimizer are told."""

from typing import Any

import torch

from aquila.config import EffectiveConfig
from aquila.config.deepspeed_zero import check_groups
from aquila.config.run import batch_sizes
from aquila.model.linear import in_stored_order

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def deepspeed_config(effective: EffectiveConfig, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is told: our run keys, over what `deepspeed.json` says to it alone."""
    run = effective.run
    # The most that any step takes: it decides the buffers; each step then says its own.
    micro = run.batch_size * run.replicas(world_size)
    most = max(samples for _, samples in batch_sizes(run, world_size)) // micro
    zero: dict[str, Any] = {"contiguous_gradients": True, "reduce_scatter": True}
    zero |= effective.deepspeed.get("zero_optimization", {})
    check_groups(zero, run.zero_stage, world_size)
    # Where nothing is sent, DeepSpeed would only wait for the device in each micro step.
    overlap = run.overlap_comm is not False and (world_size > 1 or run.zero_stage == 3)
    zero |= {"stage": run.zero_stage, "overlap_comm": overlap}
    config = effective.deepspeed | {
        "train_micro_batch_size_per_gpu": run.batch_size,
        "gradient_accumulation_steps": most,
        "gradient_clipping": 0.0 if run.optimizer == "muon" else run.clip_grad,  # it would clip the updates
        "steps_per_print": 2**31 - 1,  # the console is ours
        "timers": {"throughput": {"enabled": False}},  # so are rates; its timer waits for the device
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if run.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if run.precision == "fp16":
        config["fp16"] = effective.fp16 | {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": max(0, round(run.bmt_loss_scale).bit_length() - 1),
            "loss_scale_window": run.loss_scale_window,
        }
    if run.precision != "fp32" and most > 1:
        # Sums over many micro steps in 16 bits would lose the small gradients.
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return config


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms) without, as in the original recipe.

    ZeRO puts each group into one buffer in this order, so that products can be joined.
    """
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in in_stored_order(model):
        # Divided by ZeRO-3 it is flat, and its own shape stands beside it.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) > 1 else vectors).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
