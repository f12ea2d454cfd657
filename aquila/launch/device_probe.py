"""What this machine's Python can do for a run. Asked in its own process: torch takes seconds to import."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from aquila.backend import host
from aquila.core.errors import UserError
from aquila.core.paths import ROOT
from aquila.launch import toolkit

# Says which import fails, rather than failing: a broken vendor stack is what a probe is for.
_PROBE = """
import json, os
from aquila.launch.device_probe import facts_of, installed
from aquila.launch.toolkit import cann_version
from pathlib import Path
import torch
from aquila.backend import detect, get_backend
from aquila.core.errors import UserError
from aquila.training.deepspeed.patches import why_not_blockwise

kind = detect()
backend = get_backend(kind)
unsupported = ""
try:
    backend.set_device(0)
except UserError as error:
    unsupported = str(error)
versions = installed()
for library in ("cuda", "hip", "xpu"):
    if getattr(torch.version, library, None):
        versions[library.upper()] = getattr(torch.version, library)
toolkit = os.environ.get("ASCEND_HOME_PATH")
if cann := cann_version():
    versions["CANN"] = cann
if torch.accelerator.is_available():
    if hasattr(torch.accelerator, "get_memory_info"):
        free, total = torch.accelerator.get_memory_info()
    else:  # before torch 2.9
        free, total = getattr(torch, kind).mem_get_info()
else:
    import psutil
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
print("\\nAQUILA-PROBE " + json.dumps(facts_of(kind, backend) | {
    "blockwise": why_not_blockwise(versions.get("deepspeed") or "of an unknown release") is None,
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
    check_names(shapes, Weights(folder, config).found(config), folder)
    answer["parameters"] = sum(shape.numel() for shape in shapes.values())
except UserError as error:
    answer["problem"] = str(error)
print("\\nAQUILA-PROBE " + json.dumps(answer))
"""

_ASYNC_IO = """
import json
from aquila.training.deepspeed.async_io import has_async_io

print("\\nAQUILA-PROBE " + json.dumps({"usable": has_async_io()}))
"""


def facts_of(device: str, backend: Any) -> dict[str, Any]:
    """What a backend's module says of its device: the first keys of `probe_devices`."""
    return {
        "device": device,
        "count": backend.device_count(),
        "name": backend.device_name(),
        "precisions": list(backend.supported_precisions()),
        "fp8": backend.fp8_support(),
        "overlap_comm": backend.OVERLAP_COMM,
        "zero_kernels": backend.ZERO_KERNELS,
        "kept": backend.KEPT,
    }


def installed() -> dict[str, str]:
    """Versions of Python and of the packages that a run stands on, those that are there."""
    versions = {"Python": platform.python_version()}
    for package in ("torch", "torch_npu", "deepspeed", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def look_at_devices() -> dict[str, Any]:
    """As `probe_devices` for a command that starts nothing: without loading torch, a second, where torch is a
    build for CPUs alone. What would be wrong with loading it is then not seen."""
    if not host.is_only_device():
        return probe_devices()
    memory = psutil.virtual_memory()
    return facts_of(host.TYPE, host) | {
        "memory": memory.total,
        "memory_free": memory.available,
        "versions": installed(),
    }


@lru_cache(maxsize=1)
def probe_devices(timeout: float = 120.0) -> dict[str, Any]:
    """This machine's devices and versions.

    Keys: device (its type), count, name, precisions, fp8 (how float8 layers run, or why they cannot),
    overlap_comm (whether gradients are reduced during backward by default),
    zero_kernels (whether DeepSpeed has kernels of its own for it), kept (how its operators keep
    activations, for `planning.memory`),
    blockwise (whether the installed DeepSpeed takes the project's optimizer step),
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
    if vendor and "CUDA" in versions:
        problems.append(f"torch {torch} is a CUDA build, which torch_npu refuses{_CUDA_TORCH}")
    if vendor and not facts.get("toolkit"):
        problems.append(f"torch_npu is there, but CANN is not set up (ASCEND_HOME_PATH is empty){_no_cann()}")
    elif vendor and (problem := toolkit.pair_problem(vendor, versions.get("CANN"))):
        problems.append(problem)
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


def probe_async_io(timeout: float = 120.0) -> bool:
    """Whether DeepSpeed can build what offload to nvme needs: libaio with its header, and a compiler."""
    return _ask(_ASYNC_IO, timeout, "asking DeepSpeed for async_io")["usable"]


def _ask(code: str, timeout: float, what: str, *words: str) -> dict[str, Any]:
    toolkit.set_up()
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
    raise UserError(f"{sys.executable} cannot load torch and its device: {load_failure(done.stderr)}")


_CUDA_TORCH = (
    "; install the CPU build of the same release (on aarch64 the package index has the CUDA build): "
    "TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/install.sh npu"
)


def _no_cann() -> str:
    looked = toolkit.find_set_env() or ", ".join(toolkit.PLACES)
    return (
        f"; install CANN, or name its set_env.sh: {toolkit.SET_ENV}=/path/to/set_env.sh (looked at {looked})"
    )


def _old_cann() -> str:
    cann = toolkit.cann_version()
    known = cann or "(version not found)"
    return f"; CANN {known} is older than this torch_npu asks for: {toolkit.fitting(cann)}"


_REMEDIES = (
    (re.compile("No module named"), lambda: "; run: bash scripts/install.sh"),
    (re.compile("Two accelerators cannot be used"), lambda: _CUDA_TORCH),
    (re.compile("undefined symbol: (acl|Hccl|ge|rt)"), _old_cann),
    (
        re.compile(r"libascend_hal\.so|libdrvdsmi_host\.so"),
        lambda: (
            f"; the NPU driver's libraries are not in reach: install the driver, in a container mount "
            f"{toolkit.DRIVER.removesuffix('/lib64')}, and see that LD_LIBRARY_PATH names "
            f"{toolkit.DRIVER}/driver"
        ),
    ),
    (re.compile(r"lib(ascend|hccl|ge_|acl_|graph|runtime|msprofiler)\w*\.so|backend extension"), _no_cann),
)
_ERROR = re.compile(r"[\w.]*(Error|Exception): ")
_WRAPPER = "Failed to load the backend extension"


def load_failure(stderr: str) -> str:
    """The cause in the output of a Python that could not load torch and its device, and what to do about it.

    torch's loader of extensions and torch_npu's excepthook write after the error that caused theirs.
    """
    lines = stderr.strip().splitlines() or ["(no message)"]
    errors = [line for line in lines if _ERROR.match(line) and _WRAPPER not in line]
    cause = errors[-1] if errors else lines[-1]
    remedy = next((say() for pattern, say in _REMEDIES if pattern.search(cause)), None)
    if remedy is None:
        remedy = next((say() for pattern, say in _REMEDIES if pattern.search(stderr)), "")
    return f"{cause}{remedy}"
