"""Backends under test. Their arithmetic runs on CPU tensors: with the device's own kernel where there is
one, with plain torch where the device's kernel is torch's too, and with stand-in kernels for torch_npu's."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["cpu", "cuda", "npu"])
def backend(request):
    """Each device's module, ready for CPU tensors."""
    import npu_kernels

    from aquila.backend import get_backend

    if request.param == "npu":
        npu_kernels.define()
    return get_backend(request.param)
