"""Every check that can be made before a rank starts, each with what to do about it."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aquila.config import Device, EffectiveConfig, load_run_config
from aquila.config.compare import check_function
from aquila.config.deepspeed_zero import check_groups
from aquila.config.run import batch_sizes
from aquila.core.checkpoints import FOLDER, STATE, list_checkpoints
from aquila.core.errors import UserError
from aquila.core.paths import ROOT
from aquila.core.run_folder import choose_version, experiment_dir, first_unwritable, versions
from aquila.launch.device_probe import look_at_devices, mismatches, probe_devices, probe_weights
from aquila.launch.hostfile import Node, read_hostfile
from aquila.launch.node_probe import existing_parent
from aquila.launch.nodes import find_this_node
from aquila.planning.memory import GIB, estimate, setup_of
from aquila.preflight.nvme import check_nvme, nvme_folders

PASS, WARN, FAIL = "pass", "warn", "fail"


class Finding(NamedTuple):
    """A row of the preflight table."""

    check: str
    state: str
    detail: str


class CheckWarning(Exception):  # noqa: N818 - not an error
    """A check's way to say: this works, but look."""


@dataclass
class PreflightReport:
    """What the checks found, and what they read on the way."""

    findings: list[Finding] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    here: Node | None = None
    devices: dict[str, Any] | None = None
    merged: EffectiveConfig | None = None

    @property
    def config(self) -> EffectiveConfig:
        """The merged configuration, where its check passed."""
        assert self.merged is not None
        return self.merged

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """Runs one check and notes its outcome; the rest goes on whatever it is."""
        try:
            self.findings.append(Finding(name, PASS, check()))
        except CheckWarning as warning:
            self.findings.append(Finding(name, WARN, str(warning)))
        except UserError as error:
            self.findings.append(Finding(name, FAIL, str(error)))
            return False
        return True

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.state == FAIL]

    def downgrade(self, keep: set[str]) -> None:
        """Failures of other checks than `keep` become warnings."""
        self.findings = [
            finding._replace(state=WARN) if finding.state == FAIL and finding.check not in keep else finding
            for finding in self.findings
        ]

    def raise_failures(self) -> None:
        """Raises one `UserError` with every failure."""
        if self.failures:
            raise UserError("\n  ".join(finding.detail for finding in self.failures))


def check_run(
    hostfile: Path,
    config: str,
    model: str,
    overrides: list[str],
    *,
    local: bool,
    root: Path = ROOT,
    experiment: str | None = None,
    starts: bool = True,
) -> PreflightReport:
    """The checks that need no other node. Starts nothing and writes nothing.

    experiment: whose newest checkpoint the run goes on from, where its name is known. starts: whether a run
    is to follow, for which devices are tried and not only looked at.
    """
    checked = PreflightReport()
    with ThreadPoolExecutor(1) as background:
        probing = background.submit(probe_devices if starts else look_at_devices)
        if checked.run("hostfile", lambda: _hostfile(checked, hostfile)) and local:
            checked.run("this node", lambda: _this_node(checked, hostfile))
        checked.run("devices", lambda: _devices(checked, probing.result()))
    if checked.run("configuration", lambda: _configuration(checked, config, model, overrides, root)):
        checked.run("weights", lambda: _weights(checked.config))
        if checkpoint := _checkpoint(checked.config, root, experiment, local):
            nodes = [checked.here] if local and checked.here else checked.nodes
            world_size = sum(node.slots for node in nodes) or None
            checked.run("resume", lambda: _resume(checked.config, checkpoint, world_size))
        checked.run("tokenizer and data", lambda: _data(checked.config, root))
        if checked.devices and checked.nodes:
            checked.run("memory", lambda: _memory(checked))
        if local:
            checked.run("disk space", lambda: _room(checked.config, root))
            if experiment is not None:
                checked.run("run folder", lambda: check_writable(checked.config, root, experiment))
        if checked.nodes and (folders := _nvme(checked)):
            checked.run("offload to nvme", lambda: check_nvme(folders))
    return checked


def _hostfile(checked: PreflightReport, path: Path) -> str:
    checked.nodes = read_hostfile(path)
    total = sum(node.slots for node in checked.nodes)
    return f"{len(checked.nodes)} node(s), {total} slot(s)"


def _this_node(checked: PreflightReport, path: Path) -> str:
    checked.here = find_this_node(checked.nodes, str(path))
    return f"{checked.here.host}, line {checked.here.line}"


def _devices(checked: PreflightReport, devices: dict[str, Any]) -> str:
    checked.devices = devices
    unit = "core(s)" if devices["device"] == "cpu" else "device(s)"
    if checked.here and checked.here.slots > devices["count"]:
        raise UserError(
            f"line {checked.here.line} of the hostfile gives {checked.here.host} "
            f"slots={checked.here.slots}, but it has {devices['count']} {unit} "
            f"({devices['device']}: {devices['name']}); write slots={devices['count']} or fewer"
        )
    if problems := mismatches(devices):
        raise UserError("\n  ".join(problems))
    return f"{devices['count']} {unit}, {devices['device']}: {devices['name']}"


def _configuration(
    checked: PreflightReport, config: str, model: str, overrides: list[str], root: Path
) -> str:
    device = None
    if checked.devices:
        found = checked.devices
        device = Device(
            found["device"],
            tuple(found["precisions"]),
            found["fp8"],
            found.get("overlap_comm", True),
            found.get("zero_kernels", True),
        )
    checked.merged = load_run_config(config, model, overrides, device=device, root=root)
    if checked.nodes:
        slots = sum(node.slots for node in checked.nodes)
        batch_sizes(checked.config.run, slots)
        zero = checked.config.deepspeed.get("zero_optimization", {})
        check_groups(zero, checked.config.run.zero_stage, slots)
    return f"{checked.config.config_path}; {len(checked.config.notes)} note(s)"


def _memory(checked: PreflightReport) -> str:
    """The estimate of `memory.py` against the smallest share that a rank of this node gets."""
    config, devices = checked.config, checked.devices or {}
    nodes = [checked.here] if checked.here else checked.nodes
    on_cpu = devices["device"] == "cpu"
    share = devices["memory"] / (max(node.slots for node in nodes) if on_cpu else 1)
    slots = sum(node.slots for node in nodes)
    setup = setup_of(
        config, slots, devices["device"], devices.get("kept"), blockwise=devices.get("blockwise", True)
    )
    needed = estimate(config.model, setup)
    text = f"about {needed.peak / GIB:.1f} GiB needed ({needed.fullest}), {share / GIB:.1f} GiB a rank"
    if needed.peak > share:
        plan = f"aquila.plan {config.model_dir.name} --devices {setup.devices} --memory {share / GIB:.0f}GiB"
        raise UserError(
            f"{text}: it will not fit; lower batch_size, raise ckpoint_layer or zero_stage (python -m {plan} "
            "proposes), or take --no-preflight if you know better"
        )
    if needed.peak > 0.9 * share:
        raise CheckWarning(f"{text}: close")
    return text


def _nvme(checked: PreflightReport) -> dict[Path, float]:
    """What this node, or the one with the most slots, keeps in files."""
    slots = [node.slots for node in checked.nodes]
    return nvme_folders(checked.config, sum(slots), checked.here.slots if checked.here else max(slots))


def checkpoint_bytes(config: EffectiveConfig) -> int:
    """Size of the checkpoints that a run keeps, and of one more that is being written.

    A checkpoint: weights in the training dtype, and in fp32 master weights and Adam's two moments.
    """
    weights = 4 if config.run.precision == "fp32" else 2
    one = config.model.parameter_count() * (weights + (12 if config.run.save_optim else 0))
    return one * (max(1, config.run.keep_checkpoints) + 1)


def _room(config: EffectiveConfig, root: Path) -> str:
    place = existing_parent(root / "checkpoints_out")
    return check_room(
        place, shutil.disk_usage(place).free, os.access(place, os.W_OK), checkpoint_bytes(config)
    )


def check_writable(config: EffectiveConfig, root: Path, experiment: str) -> str:
    """Raises `UserError` for what the run could not write of the folder that it goes on in, or would make."""
    folder = experiment_dir(root, experiment)
    version, goes_on = choose_version(folder, config.run.resume)
    place = folder / version if goes_on else existing_parent(folder)
    unwritable = first_unwritable(place) if goes_on else (None if os.access(place, os.W_OK) else place)
    if unwritable is not None:
        raise UserError(
            f"{unwritable} cannot be written by this user; it belongs to {_owner(unwritable)}: give it to "
            "the user who trains (chown -R), or take another experiment name"
        )
    return f"{folder / version} can be written"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):
        return "another user"


def check_room(place: Path, free: int, writable: bool, needed: int) -> str:
    """Raises `UserError` when the checkpoints cannot be written to `place`."""
    if not writable:
        raise UserError(f"{place} cannot be written by this user; checkpoints go there")
    text = f"{free / 1e9:,.1f} GB free under {place}, {needed / 1e9:,.1f} GB needed for checkpoints"
    if free < needed:
        raise UserError(f"{text}; make room, or lower keep_checkpoints")
    return text


def small_paths(config: EffectiveConfig) -> list[Path]:
    """What every node must have alike, and is copied where it is not: configuration and model folder."""
    places = (config.config_path, config.deepspeed_path, config.model_dir)
    return [path.resolve() for path in places if path is not None]


def data_paths(config: EffectiveConfig, root: Path) -> list[Path]:
    """What every node must have alike, and is too large to be copied."""
    masks = [mask for prefix in config.run.datasets if (root / (mask := f"{prefix}_loss_mask.idx")).is_file()]
    paths = [f"{prefix}{end}" for prefix in config.run.datasets for end in (".idx", ".bin")]
    paths += [f"{mask.removesuffix('.idx')}{end}" for mask in masks for end in (".idx", ".bin")]
    return [root / path for path in paths]


def weight_files(model_dir: Path) -> list[Path]:
    """The files of a model folder that hold weights."""
    patterns = ("*.safetensors", "pytorch_model*.bin")
    return sorted(path for pattern in patterns for path in model_dir.glob(pattern))


def _weights(config: EffectiveConfig) -> str:
    if not config.run.bmt_pre_load:
        return "from scratch (bmt_pre_load: False)"
    files = weight_files(config.model_dir)
    if not files:
        raise UserError(
            f"bmt_pre_load is True ({config.sources['bmt_pre_load']}), but {config.model_dir} holds no "
            "weights (pytorch_model.bin or *.safetensors); put them there, or train from scratch with "
            "bmt_pre_load=False"
        )
    empty = [path.name for path in files if path.stat().st_size == 0]
    if empty:
        raise UserError(f"{config.model_dir}: {', '.join(empty)} is empty; download it again")
    parameters = probe_weights(config.model_dir)
    return f"{', '.join(path.name for path in files)}: {parameters:,} parameters, as config.json says"


def _checkpoint(config: EffectiveConfig, root: Path, experiment: str | None, local: bool) -> Path | None:
    """The checkpoint that the run will go on from, as far as this node can tell."""
    resume = config.run.resume
    if resume not in ("auto", "never"):
        return root / resume if local or (root / resume).exists() else None
    if resume == "never" or experiment is None:
        return None
    kept = [list_checkpoints(run / FOLDER) for run in versions(experiment_dir(root, experiment))]
    return next((checkpoints[-1] for checkpoints in reversed(kept) if checkpoints), None)


def _resume(config: EffectiveConfig, checkpoint: Path, world_size: int | None) -> str:
    if not (checkpoint / STATE).is_file():
        raise UserError(f"resume={config.run.resume}: {checkpoint} is no checkpoint of a run")
    return "; ".join([f"from {checkpoint}", *check_function(checkpoint, config, world_size)])


def _data(config: EffectiveConfig, root: Path) -> str:
    from aquila.data.meta import check_datasets

    prefixes = config.run.datasets
    notes = check_datasets([root / prefix for prefix in prefixes], config.model_dir, config.model.vocab_size)
    if notes:
        raise CheckWarning("; ".join(notes))
    return f"{len(prefixes)} dataset(s) made with this tokenizer"
