"""Offload to files (DeepSpeed's ZeRO-Infinity): the folder, its room, and the library that it needs.

Not run on a device by this project: what is checked here is what DeepSpeed would stumble over.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from aquila.config import EffectiveConfig
from aquila.config.deepspeed_zero import offload_device
from aquila.core.errors import UserError
from aquila.launch.device_probe import probe_async_io

STATE_BYTES = 16
"""A parameter: master weight, both moments and a gradient, fp32 (DeepSpeed's optimizer swapper)."""


def nvme_folders(config: EffectiveConfig, devices: int, slots: int) -> dict[Path, float]:
    """The folders of a node with `slots` of all `devices`, and the bytes that go into each."""
    zero: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    weight = 4 if config.run.precision == "fp32" else 2
    share = config.model.parameter_count() * slots / devices
    folders: dict[Path, float] = {}
    for what, size in (("optimizer", STATE_BYTES), ("param", weight)):
        if offload_device(zero, what) == "nvme":
            folder = Path(zero[f"offload_{what}"]["nvme_path"])
            folders[folder] = folders.get(folder, 0.0) + size * share
    return folders


def check_nvme(folders: dict[Path, float]) -> str:
    """What is there. Raises `UserError` for a folder that cannot take its part, and without libaio."""
    problems = []
    for folder, needed in folders.items():
        if not folder.is_dir():
            problems.append(f"nvme_path {folder} is no folder on this node; make it on a local disk")
        elif not os.access(folder, os.W_OK):
            problems.append(f"nvme_path {folder} cannot be written by this user")
        elif (free := shutil.disk_usage(folder).free) < needed:
            problems.append(
                f"nvme_path {folder}: {free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB needed; "
                "take a larger disk, or offload to cpu"
            )
    if not probe_async_io():
        problems.append(
            "DeepSpeed's async_io, which offload to nvme needs, cannot be built: install libaio-dev (apt) or "
            "libaio-devel (yum) and a C++ compiler, on every node"
        )
    if problems:
        raise UserError("\n  ".join(problems))
    return ", ".join(f"{folder}: room for {needed / 1e9:,.1f} GB" for folder, needed in folders.items())
