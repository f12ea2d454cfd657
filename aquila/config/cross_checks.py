"""What no single key can tell: whether the keys of a merged configuration go together, and with the model."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from aquila.config.deepspeed import DeepSpeedFile
from aquila.config.run import RunConfig
from aquila.core.errors import UserError

if TYPE_CHECKING:
    from aquila.config.effective import Device, EffectiveConfig

FP8_RUNS = ("native", "emulated")
"""How linear layers in float8 run on a device; anything else it says is why they cannot."""


def cross_check(effective: "EffectiveConfig", json_file: DeepSpeedFile | None) -> None:
    """Whether keys of all layers and of the model go together; adds notes on what has no effect.

    Raises `UserError`.
    """
    run, model = effective.run, effective.model
    if run.compile and run.zero_stage == 3:
        raise UserError(
            f"compile ({effective.sources['compile']}) goes with zero_stage 1 or 2, not 3 "
            f"({effective.sources['zero_stage']}): ZeRO-3 gathers each module's weights when it is called, "
            "which breaks a compiled block into pieces; leave compile out"
        )
    if effective.seq_length > model.max_seq_len:
        raise UserError(
            f"seq_length {run.seq_length} ({effective.sources['seq_length']}) is longer than the model's "
            f"max_seq_len {model.max_seq_len}; lower it, or change {effective.model_dir / 'config.json'}"
        )
    if json_file and json_file.train_batch_size is not None:
        micro = run.batch_size * run.gradient_accumulation_steps
        if json_file.train_batch_size % micro:
            raise UserError(
                f"{json_file.path}: train_batch_size {json_file.train_batch_size} is not a multiple of "
                f"batch_size x gradient_accumulation_steps = {micro}; leave it out, it follows from them"
            )
        effective.notes.append(
            f"{json_file.path.name}: train_batch_size is not used: it is batch_size x "
            "gradient_accumulation_steps x devices"
        )
    _check_steering(effective)
    _check_sequence_parallel(effective)
    _check_muon(effective)
    _check_lm_eval(effective)
    if not (run.save_optim and run.save_rng):
        left_out = " and ".join(
            n for n, on in (("optimizer", run.save_optim), ("random", run.save_rng)) if not on
        )
        effective.notes.append(f"checkpoints hold no {left_out} state: a resumed run will not be exact")


def _check_steering(effective: "EffectiveConfig") -> None:
    """Keys that need one another, whichever layers they come from."""
    run, sources = effective.run, effective.sources
    if (run.rewarm_from is None) != (run.rewarm_iters is None):
        raise UserError("rewarm_from and rewarm_iters go together: from which step, and for how many steps")
    if run.wsd_start is None:
        return
    if run.lr_decay_style != "wsd":
        raise UserError(
            f"wsd_start {run.wsd_start} ({sources['wsd_start']}) needs lr_decay_style wsd, not "
            f"{run.lr_decay_style} ({sources['lr_decay_style']})"
        )
    end = run.lr_decay_iters or run.train_iters
    if end is not None and run.wsd_start >= end:
        raise UserError(
            f"wsd_start {run.wsd_start} ({sources['wsd_start']}) is not before step {end}, where the decay "
            "ends; raise train_iters or lr_decay_iters"
        )


def _check_sequence_parallel(effective: "EffectiveConfig") -> None:
    """Whether so many ranks can share a sample of this length, and its heads."""
    run, model, length = effective.run, effective.model, effective.seq_length
    size = run.sequence_parallel
    if size == 1:
        return
    what = f"sequence_parallel {size} ({effective.sources['sequence_parallel']})"
    if problem := model.why_not_shared(size, length):
        raise UserError(f"{what} {problem} ({effective.model_dir / 'config.json'})")
    effective.notes.append(
        f"{what}: {size} neighbouring ranks share each sample, each with {length // size} of its {length} "
        "positions; a step takes batch_size x gradient_accumulation_steps x devices / sequence_parallel "
        "samples"
    )


def _check_lm_eval(effective: "EffectiveConfig") -> None:
    """Whether the harness is there, and will have a checkpoint when it is due."""
    run, source = effective.run, effective.sources["lm_eval"]
    if run.lm_eval is None:
        return
    if find_spec("lm_eval") is None or find_spec("transformers") is None:
        raise UserError(
            f"lm_eval ({source}) needs packages: pip install lm_eval transformers, or leave it out"
        )
    if run.lm_eval.every % run.save_interval:
        raise UserError(
            f"lm_eval: every {run.lm_eval.every} ({source}) is no multiple of save_interval "
            f"{run.save_interval}: there would be no checkpoint to score"
        )
    if run.lm_eval.include_path is not None and not Path(run.lm_eval.include_path).is_dir():
        raise UserError(f"lm_eval: include_path {run.lm_eval.include_path} ({source}) is no folder")


def _check_muon(effective: "EffectiveConfig") -> None:
    """What Muon goes together with."""
    run, sources = effective.run, effective.sources
    if run.optimizer != "muon":
        for key in ("muon_lr", "muon_momentum"):
            if getattr(run, key) != RunConfig.model_fields[key].default:
                raise UserError(f"{key} ({sources[key]}) needs optimizer muon, not {run.optimizer}")
        return
    for wrong, problem in (
        (run.zero_stage == 3, f"zero_stage 1 or 2, not 3 ({sources['zero_stage']})"),
        (run.precision == "fp16", f"precision bf16 or fp32, not fp16 ({sources['precision']})"),
        (
            run.zero_step == "blockwise",
            f"DeepSpeed's own step, not zero_step blockwise ({sources['zero_step']})",
        ),
        ("offload_optimizer" in effective.deepspeed.get("zero_optimization", {}), "no offload_optimizer"),
    ):
        if wrong:
            raise UserError(f"optimizer muon ({sources['optimizer']}) goes with {problem}")
    effective.notes.append(
        "optimizer muon: clip_grad is not used (DeepSpeed would clip the updates), and grad_norm is theirs"
    )


def check_fp8(effective: "EffectiveConfig", device: "Device | None") -> None:
    """Whether the layers' products can be in float8: on this device, and of these sizes."""
    run, model, sources = effective.run, effective.model, effective.sources
    key_width = model.kv_heads * model.head_dim
    sizes = {
        f"dim of {effective.model_dir}": model.dim,
        f"width of queries of {effective.model_dir}": model.n_heads * model.head_dim,
        f"width of keys and values of {effective.model_dir}": key_width,
        f"feed-forward size of {effective.model_dir}": model.ffn_dim,
        "batch_size x seq_length": run.batch_size * effective.seq_length,
    }
    problems = [
        f"its products need multiples of 16, and {name} is {size}"
        for name, size in sizes.items()
        if size % 16
    ]
    if device is not None and device.fp8 not in FP8_RUNS:
        problems.insert(0, device.fp8)
    if run.precision not in ("bf16", "auto"):
        problems.append(f"it goes with precision bf16, not {run.precision} ({sources['precision']})")
    if run.zero_stage == 3:
        problems.append(
            f"it goes with zero_stage 1 or 2, not 3 ({sources['zero_stage']}): its layers would keep the "
            "weights that ZeRO-3 gathers until backward"
        )
    what = f"fp8: {run.fp8} ({sources['fp8']})"
    if problems:
        raise UserError(f"{what}: " + "; ".join(problems))
    note = "the layers' matrices multiply in float8 (torchao); embedding and output matrix do not"
    if device is not None and device.fp8 == "emulated":
        note += f"; {device.type} emulates it: the same rounding, and slow, for looking at losses"
    effective.notes.append(f"{what}: {note}")
