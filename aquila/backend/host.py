"""The processor and the facts of its operators, without torch: what a command needs that starts nothing.

`cpu` offers all of it, too.
"""

import os
import platform
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from aquila.backend import fp8

TYPE = "cpu"
OVERLAP_COMM = True
ZERO_KERNELS = False
KEPT = {"one_pass": 1, "statistics": 4}


def is_only_device() -> bool:
    """Whether torch, as it is installed, knows no device but the processor: a build for it, and no plug-in.

    False where that cannot be told without loading torch.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None or find_spec("torch_npu") is not None:
        return False
    try:
        facts = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    built_for = dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*= *(.+?) *$", facts, re.MULTILINE))
    return built_for.get("cuda") == "None" and set(built_for.values()) == {"None"}


def device_count() -> int:
    """Ranks that make sense here: one a core at most."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def device_name() -> str:
    """The processor as its vendor calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def supported_precisions() -> tuple[str, ...]:
    """fp16 is left out: DeepSpeed refuses it on CPU."""
    return ("bf16", "fp32")


def fp8_support() -> str:
    """How linear layers in float8 run here: "native", "emulated", or why they cannot and what to do."""
    return fp8.problem() or fp8.EMULATED
