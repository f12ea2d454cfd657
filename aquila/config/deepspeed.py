"""`deepspeed.json`: which of its keys are keys of ours, and what remains for DeepSpeed itself.

DeepSpeed ignores unknown top-level keys; here they are errors. The names are those of
`deepspeed/runtime/constants.py` and `deepspeed/runtime/zero/config.py`, version 0.19.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aquila.config.deepspeed_values import typed
from aquila.config.deepspeed_zero import OBJECTS, inner_keys, refusals
from aquila.config.strict import nearest
from aquila.core.errors import UserError
from aquila.core.text_files import read_json

# Key of deepspeed.json -> the run key that is the same quantity.
_SAME = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "clip_grad",
    "steps_per_print": "log_interval",
    "optimizer.params.lr": "lr",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.betas": "betas",
    "optimizer.params.eps": "eps",
    "fp16.loss_scale": "bmt_loss_scale",
    "fp16.loss_scale_window": "loss_scale_window",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.overlap_comm": "overlap_comm",
}
# Blocks that we read and that DeepSpeed does not get to see as they stand.
_OWN = {"optimizer", "scheduler", "fp16", "bf16", "train_batch_size", "activation_checkpointing"}
_PASSED_ON = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "data_types", "checkpoint", "aio", "sparse_gradients", "seq_parallel_communication_data_type",
    "timers", "disable_python_gc", "log_level",
}  # fmt: skip
_FP16 = {
    "enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale",
    "consecutive_hysteresis", "auto_cast", "fp16_master_weights_and_grads",
}  # fmt: skip
_KNOWN = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
}
_KNOWN |= _OWN | _PASSED_ON


class DeepSpeedFile:
    """A read and checked `deepspeed.json`.

    `values` maps a run key to (value, key in the JSON); `passed_on` is what DeepSpeed gets beside
    what the engine sets; `notes` are lines for the start-up table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, tuple[Any, str]] = {}
        self.notes: list[str] = []
        data = typed(path, read_json(path), self.notes)
        self._check_keys(data)
        self.passed_on = {key: value for key, value in data.items() if key in _PASSED_ON}
        self.hysteresis = data.get("fp16", {}).get("hysteresis", 2)
        self.min_loss_scale = data.get("fp16", {}).get("min_loss_scale", 1)
        self.train_batch_size = data.get("train_batch_size")
        self._collect(data)

    def _check_keys(self, data: dict[str, Any]) -> None:
        zero = data.get("zero_optimization", {})
        if problems := refusals(zero):
            raise UserError(f"{self.path}: " + "\n  ".join(problems))
        for where, found, known in (
            ("", data, _KNOWN),
            ("zero_optimization.", zero, inner_keys("")),
            *((f"zero_optimization.{key}.", zero.get(key, {}), inner_keys(key)) for key in OBJECTS),
            ("fp16.", data.get("fp16", {}), _FP16),
            ("bf16.", data.get("bf16", {}), {"enabled", "immediate_grad_update", "check_grad_overflow"}),
            ("optimizer.", data.get("optimizer", {}), {"type", "params"}),
            ("optimizer.params.", data.get("optimizer", {}).get("params", {}),
             {"lr", "weight_decay", "betas", "eps", "adam_w_mode", "torch_adam", "bias_correction"}),
        ):  # fmt: skip
            for key in found:
                if key not in known:
                    raise UserError(f"{self.path}: unknown key '{where}{key}'{nearest(key, sorted(known))}")

    def _collect(self, data: dict[str, Any]) -> None:
        flat = dict(_flatten(data))
        for key, run_key in _SAME.items():
            if key in flat:
                self.values[run_key] = (flat[key], key)
        power = flat.get("fp16.initial_scale_power")
        if not self.values.get("bmt_loss_scale", (0,))[0]:  # 0 means dynamic to DeepSpeed
            self.values.pop("bmt_loss_scale", None)
            if power is not None:
                self.values["bmt_loss_scale"] = (2 ** int(power), "fp16.initial_scale_power")
        self._precision(flat)
        kind = flat.get("optimizer.type")
        if kind is not None and str(kind).lower() not in {"adam", "adamw"}:
            raise UserError(f"{self.path}: optimizer.type '{kind}': Aquila trains with Adam or AdamW")
        if flat.get("optimizer.params.adam_w_mode") is False:
            raise UserError(
                f"{self.path}: optimizer.params.adam_w_mode false: weight decay is decoupled here (AdamW)"
            )
        if "scheduler" in data:
            self.notes.append(
                f"{self.path.name}: scheduler ({data['scheduler'].get('type')}) is not used: "
                "lr, warm_up, lr_decay_style and min_lr give the schedule"
            )
        if any(data.get("activation_checkpointing", {}).values()):
            self.notes.append(
                f"{self.path.name}: activation_checkpointing is not used: it divides activations among "
                "model-parallel ranks; ckpoint_layer says what is recomputed"
            )

    def _precision(self, flat: dict[str, Any]) -> None:
        fp16, bf16 = flat.get("fp16.enabled"), flat.get("bf16.enabled")
        if fp16 and bf16:
            raise UserError(f"{self.path}: fp16.enabled and bf16.enabled are both true; choose one")
        if fp16 or bf16:
            self.values["precision"] = ("fp16", "fp16.enabled") if fp16 else ("bf16", "bf16.enabled")
        elif fp16 is False or bf16 is False:
            self.values["precision"] = ("fp32", "fp16.enabled" if fp16 is False else "bf16.enabled")


def _flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
