"""Backends under test. Their arithmetic runs on CPU tensors: with the device's own kernel where there is
one, with plain torch where the device's kernel is torch's too, and with stand-in kernels for torch_npu's."""

import pytest


@pytest.fixture(params=["cpu", "cuda", "npu"])
def backend(request):
    """Each device's module, ready for CPU tensors."""
    from aquila.backend import get_backend
    from tests.npu_simulator import kernels

    if request.param == "npu":
        kernels.define()
    return get_backend(request.param)
