"""The types of `deepspeed.json`: what a value may be, before anybody acts on it.

DeepSpeed takes `"false"` for true and fails on a rank at `"5e8"`; here each is refused by name before the
start. `"auto"`, which transformers fills in, and null mean that the key is left to its default.
The types are those of `deepspeed/runtime/zero/config.py` and `deepspeed/runtime/config.py`, version 0.19.
"""

import math
import re
from pathlib import Path
from typing import Any

from aquila.config import deepspeed_zero
from aquila.core.errors import UserError

_BOOLS = {
    "prescale_gradients", "disable_allgather", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "sparse_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_python_gc",
    "fp16.enabled", "fp16.auto_cast", "fp16.fp16_master_weights_and_grads", "fp16.consecutive_hysteresis",
    "bf16.enabled", "bf16.immediate_grad_update", "bf16.check_grad_overflow",
    "optimizer.params.adam_w_mode", "optimizer.params.torch_adam", "optimizer.params.bias_correction",
    *(f"zero_optimization.{key}" for key in deepspeed_zero.BOOLS),
}  # fmt: skip
_COUNTS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print",
    "fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis",
    *(f"zero_optimization.{key}" for key in deepspeed_zero.COUNTS),
}  # fmt: skip
_NUMBERS = {
    "gradient_clipping", "gradient_predivide_factor", "fp16.loss_scale", "fp16.min_loss_scale",
    "optimizer.params.lr", "optimizer.params.weight_decay", "optimizer.params.eps",
}  # fmt: skip
_TEXTS: dict[str, set[str] | None] = {
    "communication_data_type": {"fp16", "bf16", "fp32"},
    "seq_parallel_communication_data_type": {"fp16", "bf16", "fp32"},
    "log_level": {"debug", "info", "warning", "error", "critical"},
    "optimizer.type": None,
    "scheduler.type": None,
    **{f"zero_optimization.{key}": known for key, known in deepspeed_zero.TEXTS.items()},
}
"""The texts that a key takes; None: any, and it is looked at elsewhere."""
_OBJECTS = {
    "zero_optimization", "optimizer", "optimizer.params", "scheduler", "fp16", "bf16", "timers",
    "activation_checkpointing", "comms_logger", "flops_profiler", "data_types", "checkpoint", "aio",
    *(f"zero_optimization.{key}" for key in deepspeed_zero.OBJECTS),
}  # fmt: skip
_LISTS = {f"zero_optimization.{key}" for key in deepspeed_zero.LISTS}
_LARGEST_POWER = 64
_LOOKS_LIKE_A_VALUE = re.compile(r"\s*(true|false|yes|no|on|off|none|null|[-+]?[\d._]+(e[-+]?\d+)?)\s*", re.I)


def typed(path: Path, data: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """`data` of `deepspeed.json` without what is null or "auto"; the latter are told in `notes`.

    Raises `UserError` that names every value of a wrong type at once. Unknown keys are not looked at here.
    """
    problems: list[str] = []
    left: list[str] = []
    clean = _object(data, "", problems, left)
    if problems:
        raise UserError(f"{path}: " + "\n  ".join(problems))
    if left:
        notes.append(f'{path.name}: "auto" leaves {", ".join(left)} to YAML, command line and defaults')
    return clean


def _object(data: dict[str, Any], prefix: str, problems: list[str], left: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in data.items():
        key = prefix + name
        if value is None:
            continue
        if isinstance(value, str) and value.strip().lower() == "auto":
            left.append(key)
        elif problem := _problem(key, value):
            problems.append(f"{key}: {problem}")
        else:
            inside = isinstance(value, dict)
            result[name] = _object(value, f"{key}.", problems, left) if inside else value
    return result


def _problem(key: str, value: Any) -> str | None:
    """What is wrong with a value, None when nothing is."""
    shown = repr(value)[:60]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _OBJECTS:
        example = ', such as {"device": "cpu"}' if ".offload_" in key else ""
        return None if isinstance(value, dict) else f"must be a JSON object{example} (got {shown})"
    if key in _LISTS:
        fine = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return None if fine else f"must be a list of texts (got {shown})"
    if isinstance(value, str):
        return _text_problem(key, value, shown)
    if isinstance(value, list) and key not in _BOOLS | _COUNTS | _NUMBERS | _TEXTS.keys():
        return next((p for item in value if (p := _problem(f"{key}[]", item))), None)
    if number and not math.isfinite(value):
        return f"{value} is not a finite number"
    if key in _BOOLS and not isinstance(value, bool):
        return f"must be true or false (got {shown})"
    if key in _TEXTS:
        return f"must be a text (got {shown})"
    if key in _COUNTS | _NUMBERS and not number:
        return f"must be a number (got {shown})"
    if key in _COUNTS and (value < 0 or value != int(value)):
        return f"must be a whole number, 0 or more (got {shown})"
    if key == "fp16.initial_scale_power" and value > _LARGEST_POWER:
        return f"2 to the {shown} is no loss scale; use at most {_LARGEST_POWER}"
    return None


def _text_problem(key: str, value: str, shown: str) -> str | None:
    if key in _TEXTS:
        known = _TEXTS[key]
        return None if known is None or value.lower() in known else f"{shown} is none of {sorted(known)}"
    if key in _BOOLS | _COUNTS | _NUMBERS or _LOOKS_LIKE_A_VALUE.fullmatch(value):
        what = "true or false" if key in _BOOLS else "the value"
        return f"{shown} is a text; write {what} without quotes"
    return None
