"""The keys of `zero_optimization` in `deepspeed.json`: what each takes, and which are not for this project.

Names and types are those of DeepSpeed's own classes (`DeepSpeedZeroConfig`, those of `offload_param`,
`offload_optimizer` and `leaf_module`), release 0.19. Importing DeepSpeed here would take seconds and torch,
so a test compares the tables with the installed classes, field by field.

Guarded by: tests/unit/config/test_deepspeed_zero.py.
"""

from typing import Any

from aquila.core.errors import UserError

BOOLS = {
    "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
    "overlap_comm", "load_from_fp32_weights", "elastic_checkpoint", "cpu_offload", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential", "ignore_unused_parameters", "round_robin_gradients",
    "parameter_alignment", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint",
    "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
    "offload_param.pin_memory", "offload_optimizer.pin_memory", "offload_optimizer.pipeline_read",
    "offload_optimizer.pipeline_write", "offload_optimizer.fast_init",
}  # fmt: skip
COUNTS = {
    "stage", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "zero_hpz_partition_size", "offload_param.buffer_count", "offload_param.buffer_size",
    "offload_param.max_in_cpu", "offload_optimizer.buffer_count",
}  # fmt: skip
_DEVICES = {"none", "cpu", "nvme"}
TEXTS: dict[str, set[str] | None] = {
    "offload_param.device": _DEVICES,
    "offload_optimizer.device": _DEVICES,
    "offload_param.nvme_path": None,
    "offload_optimizer.nvme_path": None,
}
LISTS = {"leaf_module.classes", "leaf_module.names", "leaf_module.name_suffixes"}
OBJECTS = {"offload_param", "offload_optimizer", "leaf_module"}
REFUSED = {
    "mics_shard_size": "DeepSpeed has dropped MiCS; zero_hpz_partition_size divides within a node, too",
    "mics_hierarchical_params_gather": "DeepSpeed has dropped MiCS; take zero_hpz_partition_size",
    "zeropp_loco_param": "DeepSpeed has dropped LoCo; zero_quantized_gradients works without",
    "compute_grad_norm": "the norm finds bad gradients here, and is logged",
    "zenflow": "it takes steps of its own that checkpoints here do not hold",
    "stage3_module_granularity_threshold": "it takes this model for one module; leaf_module names modules",
    "legacy_stage1": "DeepSpeed has dropped it",
    "save_muon_momentum_buffer_in_memory": "it is for Muon under ZeRO-3, which does not run here",
    "offload_optimizer.ratio": "checkpoints would hold a part of the optimizer's state; offload all or none",
    "offload_optimizer.super_offload": "it needs an optimizer of its own",
    "offload_optimizer.cpuadam_cores_perc": "it belongs to super_offload, which does not run here",
}
"""Known to DeepSpeed, and an error here."""
KEYS = BOOLS | COUNTS | TEXTS.keys() | LISTS | OBJECTS
_ZERO_3 = {
    "offload_param", "sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
    "override_module_apply", "log_trace_cache_warnings", "leaf_module",
}  # fmt: skip
_NO_EFFECT = {
    "stage3_gather_16bit_weights_on_model_save": "each rank saves its part",
    "stage3_gather_fp16_weights_on_model_save": "each rank saves its part",
    "pipeline_loading_checkpoint": "each rank reads just what it holds",
    "load_from_fp32_weights": "master weights are always read",
}


def inner_keys(outer: str) -> set[str]:
    """The keys of zero_optimization itself, for "", or those of one of its objects."""
    if not outer:
        return {key for key in KEYS | REFUSED.keys() if "." not in key}
    return {key.removeprefix(f"{outer}.") for key in KEYS | REFUSED.keys() if key.startswith(f"{outer}.")}


def refusals(zero: dict[str, Any]) -> list[str]:
    """Of the keys that are given, those that are not for this project, each with the reason."""
    given = set(zero) | {f"{key}.{k}" for key in OBJECTS for k in zero.get(key) or {}}
    return [f"zero_optimization.{key}: {REFUSED[key]}" for key in sorted(given & REFUSED.keys())]


def offload_device(zero: dict[str, Any], what: str) -> str:
    """Where `what` (optimizer, param) is offloaded to: none, cpu or nvme."""
    old = zero.get("cpu_offload" if what == "optimizer" else "cpu_offload_param")
    given = zero.get(f"offload_{what}") or {}
    return given.get("device", "cpu" if old else "none")


def check_zero(zero: dict[str, Any], stage: int, without_kernels: str | None) -> list[str]:
    """Keys that need one another, a stage or a device; returns lines on those without effect.

    without_kernels: the device's type, if DeepSpeed has no kernels of its own for it. Raises `UserError`.
    """
    for what in ("optimizer", "param"):
        place, where = offload_device(zero, what), f"zero_optimization.offload_{what}"
        if place != "none" and what == "param" and stage != 3:
            raise UserError(f"{where}: parameters are divided, and offloaded, by zero_stage 3 alone")
        if place != "nvme":
            continue
        if stage != 3:
            raise UserError(f"{where}: to nvme by zero_stage 3 alone; take device cpu")
        if not zero[f"offload_{what}"].get("nvme_path"):
            raise UserError(f"{where}: device nvme needs nvme_path, a folder on a local disk of every node")
    quantized = [key for key in zero if key.startswith("zero_quantized_") and zero[key]]
    if quantized and without_kernels:
        raise UserError(
            f"zero_optimization.{quantized[0]}: DeepSpeed's kernels for it are CUDA; this is "
            f"{without_kernels}"
        )
    if stage == 3 and zero.get("elastic_checkpoint"):
        raise UserError("zero_optimization.elastic_checkpoint goes with zero_stage 1 or 2")
    notes = [f"zero_optimization.{key} has no effect: {_NO_EFFECT[key]}" for key in _NO_EFFECT if key in zero]
    if stage != 3:
        idle = sorted(key for key in zero if key in _ZERO_3 or key.startswith("stage3_"))
        notes += [f"zero_optimization: {', '.join(idle)} has no effect below zero_stage 3"] if idle else []
    return notes


def check_groups(zero: dict[str, Any], stage: int, devices: int) -> None:
    """Whether hierarchical partitioning divides so many devices. Raises `UserError`."""
    size = int(zero.get("zero_hpz_partition_size", 1))
    if stage == 3 and size > 1 and devices % min(size, devices):
        raise UserError(
            f"zero_optimization.zero_hpz_partition_size {size} does not divide {devices} devices; "
            "take the number of devices of a node"
        )
