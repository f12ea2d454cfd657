"""The compiled product of a few rows equals torch's, for every shape, and its absence changes nothing."""

import os
import subprocess
import sys

import pytest
import torch

from aquila.backend import reference
from aquila.backend.cpu_kernels import gemv

needs_kernels = pytest.mark.skipif(not gemv.available(), reason="no C++ compiler on this machine")


def case(rows, outputs, inner, dtype):
    generator = torch.Generator().manual_seed(rows * 1000 + inner)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    weight = torch.randn(outputs, inner, generator=generator)
    return x, weight


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
@pytest.mark.parametrize(
    ("outputs", "inner"), [(1, 1), (16, 32), (17, 31), (33, 256), (100, 300), (7, 1000), (80, 352)]
)
def test_bf16_equals_the_exact_product(rows, outputs, inner):
    x, weight = case(rows, outputs, inner, torch.bfloat16)
    weight = weight.bfloat16()
    exact = x.double() @ weight.double().T
    got = gemv.linear(x, weight)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-4 * inner**0.5)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 4, 6, 8, 11, 16])
@pytest.mark.parametrize(("outputs", "inner"), [(17, 31), (40, 256), (9, 1000), (80, 352)])
def test_int8_equals_the_exact_product(dtype, rows, outputs, inner):
    x, weight = case(rows, outputs, inner, dtype)
    scale = weight.abs().amax(1) / 127
    whole = (weight / scale[:, None]).round().to(torch.int8)
    exact = x.double() @ (whole.double() * scale.double()[:, None]).T
    got = gemv.linear(x, whole, scale)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    tolerance = 2 * rounding if rows > 8 else rounding  # more rows may be torch's, which rounds twice
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-4 * inner**0.5)
    torch.testing.assert_close(
        reference.step_linear(x, whole, scale).double(), exact, rtol=2 * rounding, atol=0.02 * inner**0.5
    )


@needs_kernels
def test_a_row_gives_the_same_whatever_its_company():
    """Batch-invariant within a kernel's passes: the sums of a row do not depend on the other rows' values."""
    x, weight = case(8, 64, 320, torch.bfloat16)
    weight = weight.bfloat16()
    changed = x.clone()
    changed[1:] = torch.randn(7, 320).bfloat16()
    assert torch.equal(gemv.linear(x, weight)[0], gemv.linear(changed, weight)[0])


@needs_kernels
def test_views_that_are_not_contiguous_are_taken_rightly():
    x, weight = case(2, 64, 64, torch.bfloat16)
    weight = weight.bfloat16().T
    torch.testing.assert_close(gemv.linear(x, weight), torch.nn.functional.linear(x, weight))


@needs_kernels
def test_nan_and_infinity_pass_through():
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    weight = torch.zeros(3, 64, dtype=torch.bfloat16)
    weight[0, 0], weight[1, 0] = float("nan"), float("inf")
    got = gemv.linear(x, weight)[0]
    assert got[0].isnan()
    assert got[1] == float("inf")
    assert got[2] == 0


@pytest.mark.parametrize("change", [{"AQUILA_NATIVE": "0"}, {"CXX": "no-such-compiler"}])
def test_without_the_kernels_torch_does_it(change, root, tmp_path):
    code = (
        "import torch; from aquila.backend.cpu_kernels import gemv\n"
        "x, w = torch.ones(2, 8).bfloat16(), torch.ones(3, 8).bfloat16()\n"
        "assert gemv.linear(x, w).tolist() == [[8.0] * 3] * 2\n"
        "assert not gemv.available()"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **change}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)


@needs_kernels
def test_compiled_once_and_kept(root, tmp_path):
    code = "from aquila.backend.cpu_kernels import gemv; assert gemv.available()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)
    (kept,) = (tmp_path / "aquila").iterdir()
    before = kept.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)
    assert kept.stat().st_mtime_ns == before


def test_huge_pages_are_only_advice():
    gemv.huge_pages(torch.zeros(3))
    tensor = torch.arange(3_000_000)
    gemv.huge_pages(tensor)
    assert torch.equal(tensor, torch.arange(3_000_000))


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("int8", [False, True])
def test_a_row_is_the_same_whatever_rows_come_with_it(int8):
    x, weight = case(16, 1024, 2048, torch.bfloat16)
    whole = weight.bfloat16(), None
    if int8:
        whole = (weight * 20).to(torch.int8), torch.rand(1024)
    alone = torch.cat([gemv.linear(row, *whole) for row in x.split(1)])
    for rows in (2, 3, 5, 8, 16):
        assert torch.equal(gemv.linear(x[:rows].contiguous(), *whole), alone[:rows])
