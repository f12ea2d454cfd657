"""Which devices there are, and the module of each."""

from types import ModuleType

import torch

from aquila.backend import cpu, cuda, npu, reference
from aquila.backend.reference import ATTENTION_KINDS

__all__ = ["ATTENTION_KINDS", "DEVICE_TYPES", "detect", "get_backend"]

# Importing a backend touches no device. "meta" tensors hold shapes alone: the definition gives them.
_BACKENDS = {"reference": reference, "cpu": cpu, "cuda": cuda, "npu": npu, "meta": reference}

DEVICE_TYPES = ("cpu", "cuda", "npu")


def get_backend(device_type: str) -> ModuleType:
    """The module of a device type (`torch.device.type`, or "reference").

    Raises `ValueError` for a device that has no backend here.
    """
    if device_type not in _BACKENDS:
        raise ValueError(f"no backend for device '{device_type}'; there are: {', '.join(_BACKENDS)}")
    return _BACKENDS[device_type]


def detect() -> str:
    """The best device type that this machine really has: "cuda", "npu" or "cpu".

    The NPU is asked first: TORCH_TRANSFER_TO_NPU=1 makes torch_npu answer in CUDA's name.
    """
    if npu.device_count():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"
