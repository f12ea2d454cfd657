"""What this machine's Python can do for a run. Asked in its own process: torch takes seconds to import."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from aquila.core.errors import UserError
from aquila.core.paths import ROOT

# Says which import fails, rather than failing: a broken vendor stack is what a probe is for.
_PROBE = """
import json, os, platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import torch
from aquila.backend import detect, get_backend
from aquila.core.errors import UserError

kind = detect()
backend = get_backend(kind)
unsupported = ""
try:
    backend.set_device(0)
except UserError as error:
    unsupported = str(error)
versions = {"Python": platform.python_version()}
for package in ("torch", "torch_npu", "deepspeed", "megatron-core", "numpy"):
    try:
        versions[package] = version(package)
    except PackageNotFoundError:
        continue
for library in ("cuda", "hip", "xpu"):
    if getattr(torch.version, library, None):
        versions[library.upper()] = getattr(torch.version, library)
toolkit = os.environ.get("ASCEND_HOME_PATH")
if toolkit:
    for name in ("version.cfg", "version.info", "ascend_toolkit_install.info"):
        path = Path(toolkit, name)
        if path.is_file():
            versions["CANN"] = " ".join(path.read_text().split())[:60]
            break
if torch.accelerator.is_available():
    free, total = torch.accelerator.get_memory_info()
else:
    import psutil
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
print("\\nAQUILA-PROBE " + json.dumps({
    "device": kind,
    "count": backend.device_count(),
    "name": backend.device_name(),
    "precisions": list(backend.supported_precisions()),
    "fp8": backend.fp8_support(),
    "overlap_comm": backend.OVERLAP_COMM,
    "kept": backend.KEPT,
    "memory": total,
    "memory_free": free,
    "versions": versions,
    "toolkit": bool(toolkit),
    "unsupported": unsupported,
    "unseen": [str(path) for path in sorted(Path("/dev").glob("nvidia[0-9]*"))[:1]] if kind == "cpu" else [],
}))
"""

_WEIGHTS = """
import json, sys
from aquila.core.errors import UserError
from aquila.model import AquilaModel
from aquila.model.weights import Weights, check_names, load_config

answer = {}
try:
    folder = sys.argv[1]
    config = load_config(folder)
    shapes = {name: p.shape for name, p in AquilaModel(config, device="meta").named_parameters()}
    check_names(shapes, Weights(folder, config).info, folder)
    answer["parameters"] = sum(shape.numel() for shape in shapes.values())
except UserError as error:
    answer["problem"] = str(error)
print("\\nAQUILA-PROBE " + json.dumps(answer))
"""


@lru_cache(maxsize=1)
def probe_devices(timeout: float = 120.0) -> dict[str, Any]:
    """This machine's devices and versions.

    Keys: device (its type), count, name, precisions, fp8 (how float8 layers run, or why they cannot),
    overlap_comm (whether gradients are reduced during backward by default), kept (how its operators keep
    activations, for `planning.memory`),
    memory and memory_free (bytes: of the first accelerator, on a CPU machine of the whole machine),
    versions, toolkit (whether CANN is set up in the environment), unsupported (why this chip cannot train,
    or nothing), unseen (device files of accelerators torch does not see).

    Raises `UserError` with Python's own error when torch or the device's library cannot be loaded.
    """
    return _ask(_PROBE, timeout, "looking for devices")


def mismatches(facts: dict[str, Any]) -> list[str]:
    """What does not go together in `probe_devices`'s answer, each with its remedy."""
    versions, problems = facts.get("versions", {}), []
    if facts.get("unsupported"):
        problems.append(facts["unsupported"])
    torch, vendor = versions.get("torch", ""), versions.get("torch_npu")
    if vendor and _release(vendor) != _release(torch):
        problems.append(
            f"torch_npu {vendor} is made for torch {_release(vendor)}, but torch is {torch}; install the "
            "pair (scripts/install.sh npu, or the vendor's image with both)"
        )
    if vendor and not facts.get("toolkit"):
        problems.append(
            "torch_npu is there, but CANN is not set up (ASCEND_HOME_PATH is empty); source its set_env.sh "
            "in the login shell's profile"
        )
    if facts.get("unseen") and "CUDA" in versions:
        problems.append(
            f"{', '.join(facts['unseen'])} is there, but torch sees no GPU; is the driver older than what "
            f"CUDA {versions['CUDA']} of this torch needs, or CUDA_VISIBLE_DEVICES empty?"
        )
    return problems


def _release(version: str) -> str:
    """'2.13.0.post1+cpu' to '2.13'."""
    return ".".join(version.split("+")[0].split(".")[:2])


def probe_weights(model_dir: Path, timeout: float = 120.0) -> int:
    """How many parameters a model folder's weights hold, names and shapes compared with its config.

    Reads headers only. Raises `UserError` that lists what is missing, unexpected or of another shape.
    """
    found = _ask(_WEIGHTS, timeout, f"reading the headers of the weights in {model_dir}", str(model_dir))
    if "problem" in found:
        raise UserError(found["problem"])
    return found["parameters"]


def _ask(code: str, timeout: float, what: str, *words: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"{what} took longer than {timeout:.0f} s; is a device or a disk hung?") from None
    for line in done.stdout.splitlines():
        if line.startswith("AQUILA-PROBE "):
            return json.loads(line.removeprefix("AQUILA-PROBE "))
    last = (done.stderr.strip().splitlines() or ["(no message)"])[-1]
    raise UserError(f"{sys.executable} cannot load torch and its device: {last}{_remedy(done.stderr)}")


def _remedy(error: str) -> str:
    if "No module named" in error:
        return "; run: bash scripts/install.sh"
    if "backend extension" in error or "libascend" in error or "libhccl" in error:
        return (
            "; the device's software is not set up: source its set_env.sh (CANN) in the login shell's profile"
        )
    return ""
