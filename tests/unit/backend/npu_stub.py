"""A stand-in for CANN's libraries, so that the real torch_npu can be imported where there is no NPU.

`libtorch_npu.so` needs a few dozen plain C functions of six libraries. The stub defines each of them, does
nothing in most, and reports one device. No kernel can run on it: only shapes, schemas and gradients' paths.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

LIBRARIES = ("ascendcl", "hccl", "ge_runner", "graph", "acl_op_compiler", "acl_tdt_channel")
_CANN = re.compile(r"^(acl|Hccl|Msprof|rt[A-Z]|ge[A-Z])\w*$")
# Looked up by name while torch_npu starts, so that no binary lists them.
_LOOKED_UP = (
    "aclSetCompileopt",
    "aclrtDestroyStreamForce",
    "aclrtGetSysParamOpt",
    "aclrtSetDeviceSatMode",
    "aclrtSetOpExecuteTimeOut",
)
# What a plain "return 0" would not do: one device, a chip that the wheel knows, a context that is there.
_SPOKEN = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *count) { *count = 1; return 0; }",
    "aclrtGetDevice": "int aclrtGetDevice(int *device) { *device = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B3"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return ""; }',
    "aclrtGetCurrentContext": "int aclrtGetCurrentContext(void **c) { *c = thing; return 0; }",
    "aclrtGetSysParamOpt": "int aclrtGetSysParamOpt(int o, long *value) { *value = 0; return 0; }",
    "aclrtCreateStream": "int aclrtCreateStream(void **s) { *s = thing; return 0; }",
    "aclrtCreateStreamWithConfig": (
        "int aclrtCreateStreamWithConfig(void **s, unsigned p, unsigned f) { *s = thing; return 0; }"
    ),
    "aclrtCreateEventExWithFlag": (
        "int aclrtCreateEventExWithFlag(void **e, unsigned f) { *e = thing; return 0; }"
    ),
}


def find_wheel() -> Path | None:
    """The folder that torch_npu was installed into beside the environment, or None.

    It is kept apart (`pip install --no-deps --target .venv/npu-test torch_npu==2.13.0`): once it can be
    imported by name, every plain `import torch` tries to load it and fails for want of CANN.
    """
    named = os.environ.get("AQUILA_NPU_WHEEL")
    folder = Path(named) if named else Path(sys.prefix) / "npu-test"
    return folder if (folder / "torch_npu" / "lib" / "libtorch_npu.so").is_file() else None


def missing_tool() -> str | None:
    """What this machine lacks to build the stub, or None."""
    for names in (("cc", "gcc", "g++"), ("nm",)):
        if not any(shutil.which(name) for name in names):
            return f"none of {', '.join(names)} is installed"
    return None


def build(wheel: Path, folder: Path) -> dict[str, str]:
    """Compiles the stub into `folder`; the environment in which a subprocess can import torch_npu."""
    package = wheel / "torch_npu"
    names: set[str] = set(_LOOKED_UP)
    for binary in (*sorted((package / "lib").glob("*.so")), *package.glob("_C*.so")):
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", str(binary)], capture_output=True, text=True, check=True
        )
        words = (line.split()[-1].split("@")[0] for line in listing.stdout.splitlines() if line.strip())
        names.update(word for word in words if _CANN.match(word))
    source = folder / "stub.c"
    source.write_text(
        "static char thing[64];\n"
        + "".join(_SPOKEN.get(name, f"int {name}(void) {{ return 0; }}") + "\n" for name in sorted(names))
    )
    compiler = next(name for name in ("cc", "gcc", "g++") if shutil.which(name))
    whole = folder / f"lib{LIBRARIES[0]}.so"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-x", "c", str(source), "-o", str(whole)], check=True)
    for library in LIBRARIES[1:]:
        (folder / f"lib{library}.so").symlink_to(whole)
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
        "PYTHONPATH": f"{wheel}:{Path(__file__).resolve().parents[3]}",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
    }
