"""Defaults < deepspeed.json < YAML < key=value, merged into one configuration that knows its sources."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from aquila.config import show
from aquila.config.cross_checks import check_fp8, cross_check
from aquila.config.deepspeed import DeepSpeedFile
from aquila.config.deepspeed_zero import check_zero
from aquila.config.model import ModelConfig, load_model_config
from aquila.config.run import RunConfig, as_blend, find_config
from aquila.config.strict import nearest, parse_yaml, read_yaml, validate
from aquila.core.errors import UserError

MODELS = "checkpoints_in"


class Device(NamedTuple):
    """What the configuration must know of the device it runs on."""

    type: str
    precisions: tuple[str, ...]
    """What it trains in, best first."""
    fp8: str = "native"
    """One of `cross_checks.FP8_RUNS`, or why linear layers in float8 cannot run and what to do."""
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
    cross_check(effective, json_file)
    zero = effective.deepspeed.get("zero_optimization", {})
    without_kernels = device.type if device and not device.zero_kernels else None
    effective.notes.extend(check_zero(zero, run.zero_stage, without_kernels))
    if run.fp8:
        check_fp8(effective, device)
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
