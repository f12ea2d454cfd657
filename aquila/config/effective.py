"""Defaults < deepspeed.json < YAML < key=value, merged into one configuration that knows its sources."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aquila.config import show
from aquila.config.deepspeed import DeepSpeedFile
from aquila.config.deepspeed_zero import check_zero
from aquila.config.model import ModelConfig, load_model_config
from aquila.config.run import RunConfig, as_blend, find_config
from aquila.config.strict import nearest, parse_yaml, read_yaml, validate
from aquila.core.errors import UserError

MODELS = "checkpoints_in"
FP8_RUNS = ("native", "emulated")
"""How linear layers in float8 run on a device; anything else it says is why they cannot."""


class Device(NamedTuple):
    """What the configuration must know of the device it runs on."""

    type: str
    precisions: tuple[str, ...]
    """What it trains in, best first."""
    fp8: str = "native"
    """One of `FP8_RUNS`, or why linear layers in float8 cannot run and what to do."""
    overlap_comm: bool = True
    """Whether gradients are reduced during backward unless the user says otherwise."""
    zero_kernels: bool = True
    """Whether DeepSpeed has kernels of its own for it."""


class Setting(NamedTuple):
    value: Any
    source: str
    """default, or the file or command line and the key there."""


@dataclass(frozen=True)
class EffectiveConfig:
    """The whole configuration of a run, and where each value comes from."""

    run: RunConfig
    model: ModelConfig
    model_dir: Path
    config_path: Path
    deepspeed: dict[str, Any]
    """What `deepspeed.json` says to DeepSpeed alone (zero_optimization and the like)."""
    fp16: dict[str, Any]
    """hysteresis and min_loss_scale of the dynamic loss scale."""
    history: dict[str, list[Setting]]
    """For each run key every value that was given, the winner last."""
    notes: list[str]
    deepspeed_path: Path | None = None
    """The `deepspeed.json` that was read."""

    @property
    def sources(self) -> dict[str, str]:
        return {key: settings[-1].source for key, settings in self.history.items()}

    @property
    def seq_length(self) -> int:
        return self.run.seq_length or self.model.max_seq_len

    def table(self, width: int | None = None) -> str:
        """Every key with value, source and what it overrode; then the notes. See `show.table`."""
        model = f"model {self.model_dir}: {self.model.parameter_count():,} parameters"
        return show.table(self.history, [model, *(f"note: {note}" for note in self.notes)], width)

    def summary(self, width: int = 80) -> str:
        """What the terminal shows at start-up. See `show.summary`."""
        size = f"{self.model.parameter_count():,} parameters"
        title = f"{self.config_path.name}, model {self.model_dir.name}: {size}"
        return show.summary(title, self.history, self.notes, width)

    def to_yaml(self) -> str:
        """The run's keys as a YAML file that can itself be given as CONFIG, sources as comments."""
        lines = [f"# The effective configuration. Model: {self.model_dir}"]
        for key, settings in self.history.items():
            text = yaml.safe_dump(
                {key: settings[-1].value}, default_flow_style=True, allow_unicode=True, width=10**6
            )
            lines.append(f"{text.strip()[1:-1]}  # {settings[-1].source}")
        lines += [f"# note: {note}" for note in self.notes]
        lines += [f"# for DeepSpeed: {json.dumps(self.deepspeed)}"]
        lines += [f"# {line}" for line in self.model.model_dump_json(indent=1).splitlines()]
        return "\n".join(lines) + "\n"


def load_run_config(
    config: str | Path,
    model_name: str,
    overrides: list[str],
    *,
    device: Device | None = None,
    root: Path | None = None,
) -> EffectiveConfig:
    """Merges the three files and the command line.

    config: path of the YAML file; a bare name is also looked for in `configs/`.
    model_name: a folder under `checkpoints_in/`, or a path to a model folder.
    overrides: `key=value` texts, values in YAML.
    device: resolves `precision` and `overlap_comm`; without it they stay open.

    Raises `UserError` for everything that is wrong with any of them.
    """
    root = root or Path.cwd()
    path = find_config(config, root)
    if path is None:
        raise UserError(f"config file {config} does not exist (looked in {root} and {root / 'configs'})")
    given = read_yaml(path)
    json_path = _deepspeed_path(given.pop("deepspeed_config", None), path, root)
    json_file = DeepSpeedFile(json_path) if json_path else None
    history = _merge(path, given, json_file, overrides)
    notes = list(json_file.notes) if json_file else []
    if device is not None:
        _resolve_precision(history["precision"], device, notes)
        _resolve_overlap(history["overlap_comm"], device, notes)
    run = validate(RunConfig, {key: settings[-1].value for key, settings in history.items()}, str(path))
    values = run.model_dump()
    history = {key: [*s[:-1], Setting(_sparse(values[key]), s[-1].source)] for key, s in history.items()}
    model_dir = find_model_dir(model_name, root)
    effective = EffectiveConfig(
        run=run,
        model=load_model_config(model_dir),
        model_dir=model_dir,
        config_path=path,
        deepspeed=json_file.passed_on if json_file else {},
        fp16={
            "hysteresis": json_file.hysteresis if json_file else 2,
            "min_loss_scale": json_file.min_loss_scale if json_file else 1,
        },
        history=history,
        notes=notes,
        deepspeed_path=json_path,
    )
    _cross_check(effective, json_file)
    zero = effective.deepspeed.get("zero_optimization", {})
    without_kernels = device.type if device and not device.zero_kernels else None
    effective.notes.extend(check_zero(zero, run.zero_stage, without_kernels))
    if run.fp8:
        _check_fp8(effective, device)
    return effective


def _sparse(value: Any) -> Any:
    """A table without what was left open, as a user would write it."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def find_model_dir(model_name: str, root: Path) -> Path:
    """`checkpoints_in/NAME` under `root`, or NAME itself where it is a path to a folder."""
    inside = root / MODELS / model_name
    return Path(model_name) if not inside.is_dir() and Path(model_name).is_dir() else inside


def _deepspeed_path(named: Any, config: Path, root: Path) -> Path | None:
    """The file that the YAML names, else deepspeed.json beside it, in `root`, or in `configs/`."""
    if named is not None:
        if not isinstance(named, str):
            raise UserError(f"{config}: deepspeed_config: must be a file's path (got {named!r})")
        place = next((p for p in (config.parent / named, root / named) if p.is_file()), None)
        if place is None:
            raise UserError(f"{config}: deepspeed_config {named} does not exist")
        return place
    places = [folder / "deepspeed.json" for folder in (config.parent, root, root / "configs")]
    return next((place for place in places if place.is_file()), None)


def _merge(
    path: Path, given: dict[str, Any], json_file: DeepSpeedFile | None, overrides: list[str]
) -> dict[str, list[Setting]]:
    history = {
        key: [Setting(field.get_default(), "default")] for key, field in RunConfig.model_fields.items()
    }
    if json_file:
        _check_layer({key: value for key, (value, _) in json_file.values.items()}, str(json_file.path))
        for key, (value, where) in json_file.values.items():
            history[key].append(Setting(value, f"{json_file.path.name} {where}"))
    _check_layer(given, str(path))
    for key, value in given.items():
        history[key].append(Setting(_split_prefix(key, value), path.name))
    for text in overrides:
        key, value = _parse_override(text)
        _check_layer({key: value}, f"'{_short(text)}' on the command line")
        history[key].append(Setting(_split_prefix(key, value), "command line"))
    return history


def _split_prefix(key: str, value: Any) -> Any:
    return as_blend(value) if key == "data_prefix" and isinstance(value, str) else value


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{_short(text)}' on the command line: overrides have the form key=value")
    if key not in RunConfig.model_fields:
        known = nearest(key, list(RunConfig.model_fields))
        raise UserError(f"'{_short(text)}' on the command line: unknown key '{key}'{known}")
    if RunConfig.model_fields[key].annotation is str:
        return key, value
    return key, parse_yaml(value, f"'{_short(text)}'")


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def _check_layer(values: dict[str, Any], where: str) -> None:
    """One layer's keys and types, alone, so that the message names the file that is wrong."""
    for key in values:
        if key not in RunConfig.model_fields:
            known = nearest(str(key), list(RunConfig.model_fields))
            raise UserError(f"{where}: unknown key '{key}'{known}")
    defaults = {key: field.get_default() for key, field in RunConfig.model_fields.items()}
    # A small lr in one file alone must not collide with another's min_lr: values are checked here,
    # their relations after the merge.
    alone = {key: _split_prefix(key, value) for key, value in values.items() if key != "min_lr"}
    validate(RunConfig, {**defaults, **alone}, where)


def _resolve_precision(settings: list[Setting], device: Device, notes: list[str]) -> None:
    wanted = settings[-1]
    if wanted.value == "auto":
        settings[-1] = Setting(device.precisions[0], f"{wanted.source} (auto on {device.type})")
    elif wanted.value in {"bf16", "fp16", "fp32"} and wanted.value not in device.precisions:
        can = ", ".join(device.precisions)
        if ".enabled" not in wanted.source:
            raise UserError(
                f"precision {wanted.value} ({wanted.source}): {device.type} cannot train in it, only in {can}"
            )
        instead = device.precisions[0]
        notes.append(
            f"{wanted.source} asks for {wanted.value}, which {device.type} cannot do: {instead} instead"
        )
        settings.append(Setting(instead, f"{device.type} has no {wanted.value}"))


def _resolve_overlap(settings: list[Setting], device: Device, notes: list[str]) -> None:
    """What the user's YAML or command line says holds; else what is safe on this device."""
    wanted = settings[-1]
    by_json = "zero_optimization" in wanted.source
    if not device.overlap_comm and (wanted.value is None or by_json):
        settings.append(Setting(False, f"safe on {device.type}"))
        if wanted.value:
            notes.append(
                f"{wanted.source}: on {device.type} gradients are reduced after backward, for NaNs have been "
                "reported with overlap over several nodes; overlap_comm=True overlaps them all the same"
            )
    elif wanted.value is None:
        settings[-1] = Setting(True, wanted.source)


def _cross_check(effective: EffectiveConfig, json_file: DeepSpeedFile | None) -> None:
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


def _check_steering(effective: EffectiveConfig) -> None:
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


def _check_sequence_parallel(effective: EffectiveConfig) -> None:
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


def _check_lm_eval(effective: EffectiveConfig) -> None:
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


def _check_muon(effective: EffectiveConfig) -> None:
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


def _check_fp8(effective: EffectiveConfig, device: Device | None) -> None:
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
