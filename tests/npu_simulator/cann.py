"""Builds a simulated NPU: a stand-in for CANN, and the environment in which the real torch_npu runs.

`cann.c` holds the functions whose answer matters (memory, devices, streams, events); every other symbol that
torch_npu asks for is a function that returns 0. With the environment of `build`, `import torch` loads
torch_npu by itself, as on a machine with NPUs, and then `device.install`, which computes on the host.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = ("ascendcl", "hccl", "ge_runner", "graph", "acl_op_compiler", "acl_tdt_channel")
_CANN = re.compile(r"^(acl|Hccl|Msprof|rt[A-Z]|ge[A-Z])\w*$")
_DEFINED = re.compile(r"^(?:const char \*|int )(\w+)\(", re.MULTILINE)
# Looked up by name while torch_npu runs, so that no binary lists them.
_LOOKED_UP = (
    "aclSetCompileopt",
    "aclrtCtxSetSysParamOpt",
    "aclrtDestroyStreamForce",
    "aclrtGetLastError",
    "aclrtHostRegister",
    "aclrtHostUnregister",
    "aclrtMallocPhysical",
    "aclrtFreePhysical",
    "aclrtMapMem",
    "aclrtUnmapMem",
    "aclrtReleaseMemAddress",
    "aclrtPeekAtLastError",
    "aclrtResetEvent",
    "aclrtSetDeviceSatMode",
    "aclrtSetOpExecuteTimeOut",
    "aclrtSetOpExecuteTimeOutV2",
    "aclrtSetOpWaitTimeout",
    "aclrtSetStreamAttribute",
    "aclrtSetStreamFailureMode",
    "aclrtSetStreamOverflowSwitch",
    "aclrtGetStreamOverflowSwitch",
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtSynchronizeStreamWithTimeout",
)
_ENTRY = "[torch.backends]\nnpu_simulator = npu_simulator.device:install\n"


def find_wheel() -> Path | None:
    """The folder that torch_npu was installed into beside the environment, or None.

    It is kept apart (`pip install --no-deps --target .venv/npu-test torch_npu==2.13.0`): once it can be
    imported by name, every plain `import torch` tries to load it and fails for want of CANN.
    """
    named = os.environ.get("AQUILA_NPU_WHEEL")
    folder = Path(named) if named else Path(sys.prefix) / "npu-test"
    return folder if (folder / "torch_npu" / "lib" / "libtorch_npu.so").is_file() else None


def missing() -> str | None:
    """What this machine lacks to build a simulated NPU, or None."""
    if find_wheel() is None:
        return "no torch_npu beside the environment (install.sh --dev brings it for a CPU build of torch)"
    for names in (("cc", "gcc", "g++"), ("nm",)):
        if not any(shutil.which(name) for name in names):
            return f"none of {', '.join(names)} is installed"
    return None


def build(folder: Path, *, compute: bool = True, **settings: str | int) -> dict[str, str]:
    """Makes the simulated NPU in `folder`; the environment variables of a process that is to see it.

    compute: kernels run on the host; without it torch_npu has shapes alone. settings: `npus` (how many),
    `chip` (its name), `gib` (memory of each).
    """
    wheel = find_wheel()
    assert wheel is not None, missing()
    libraries = folder / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    if not (libraries / f"lib{LIBRARIES[0]}.so").exists():
        _compile(wheel / "torch_npu", libraries)
    for part in ("opp", "runtime", "compiler"):
        (folder / "cann" / part).mkdir(parents=True, exist_ok=True)
    entry = folder / "npu_simulator-0.dist-info"  # torch finds it as it finds torch_npu
    entry.mkdir(exist_ok=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: npu_simulator\nVersion: 0\n")
    (entry / "entry_points.txt").write_text(_ENTRY)
    paths = [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
        "PYTHONPATH": ":".join(map(str, (folder, HERE.parent, wheel))),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1" if compute else "0",
        "ASCEND_HOME_PATH": str(folder / "cann"),
        "ASCEND_OPP_PATH": str(folder / "cann" / "opp"),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **{f"AQUILA_SIMULATED_{name.upper()}": str(value) for name, value in settings.items()},
    }


def _compile(package: Path, folder: Path) -> None:
    source = (HERE / "cann.c").read_text()
    names = set(_LOOKED_UP)
    for binary in (*sorted((package / "lib").glob("*.so")), *package.glob("_C*.so")):
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", str(binary)], capture_output=True, text=True, check=True
        )
        words = (line.split()[-1].split("@")[0] for line in listing.stdout.splitlines() if line.strip())
        names.update(word for word in words if _CANN.match(word))
    silent = sorted(names - set(_DEFINED.findall(source)))
    whole = folder / "stub.c"
    whole.write_text(source + "".join(f"int {name}(void) {{ return 0; }}\n" for name in silent))
    compiler = next(name for name in ("cc", "gcc", "g++") if shutil.which(name))
    made = folder / "made.so"
    command = [compiler, "-w", "-O1", "-shared", "-fPIC", "-x", "c", str(whole), "-o", str(made)]
    subprocess.run(command, check=True)
    made.rename(folder / f"lib{LIBRARIES[0]}.so")
    for library in LIBRARIES[1:]:
        (folder / f"lib{library}.so").symlink_to(f"lib{LIBRARIES[0]}.so")
