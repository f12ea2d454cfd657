"""A generation step's attention equals the definition: shapes, dtypes, cache, other rows, threads, levels."""

import pytest
import torch

from aquila.backend import cpu, reference
from aquila.backend.cpu_kernels import step_attention as kernel
from aquila.backend.reference import StepRows
from aquila.model.rotary import RotaryTables
from tests.unit.backend.cpu_kernels.levels import LEVELS, run_at_level

needs_kernel = pytest.mark.skipif(not kernel.available(), reason="no C++ compiler on this machine")
TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 2e-6}


def case(lengths, heads, kv_heads, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(len(lengths), heads + 2 * kv_heads, size, generator=generator)
    kv = torch.randn(len(lengths), 2 * kv_heads, max(lengths) + 3, size, generator=generator)
    cos, sin = RotaryTables(size, 10000.0, 2048).on(torch.device("cpu"), max(lengths) + 1)
    places = torch.tensor(lengths)
    return qkv.to(dtype), kv.to(dtype), StepRows(list(lengths), places, cos[places], sin[places])


@torch.no_grad()
def run(function, qkv, kv, rows):
    kv = kv.clone()
    return function(qkv.clone(), kv, rows), kv


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", [(0,), (5, 5), (17, 3, 255, 256), (1024, 600)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(2, 2, 64), (8, 1, 128), (6, 2, 8), (7, 1, 36), (3, 3, 80)]
)
def test_equals_the_definition(dtype, lengths, heads, kv_heads, size):
    qkv, kv, rows = case(lengths, heads, kv_heads, size, dtype)
    wanted, stored = run(reference.step_attention, qkv.double(), kv.double(), rows)
    got, cache = run(cpu.step_attention, qkv, kv, rows)
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() < TOLERANCES[dtype] * 4
    assert (cache.double() - stored).abs().max() <= TOLERANCES[dtype] * 4


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_neither_threads_nor_other_rows_change_a_row(dtype):
    qkv, kv, rows = case((700, 20, 300), 4, 2, 64, dtype)
    together, _ = run(cpu.step_attention, qkv, kv, rows)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again, _ = run(cpu.step_attention, qkv, kv, rows)
        assert torch.equal(again, together)
    torch.set_num_threads(before)
    for i, length in enumerate(rows.lengths):
        one = StepRows([length], rows.places[i : i + 1], rows.cos[i : i + 1], rows.sin[i : i + 1])
        alone, _ = run(cpu.step_attention, qkv[i : i + 1], kv[i : i + 1], one)
        assert torch.equal(alone[0], together[i])


@needs_kernel
def test_nan_in_the_cache_is_not_hidden():
    qkv, kv, rows = case((9,), 2, 1, 16, torch.float32)
    kv[0, 0, 4, 3] = float("nan")
    assert run(cpu.step_attention, qkv, kv, rows)[0].isnan().all()


@pytest.mark.parametrize("level", ["none", *LEVELS])
def test_every_level_of_the_processor(level, root, tmp_path):
    """The same source, compiled for less than this processor has; "none" is torch alone."""
    code = (
        "import torch; torch.set_grad_enabled(False)\n"
        "import test_step_attention as t, test_gemv as g\n"
        "from aquila.backend.cpu_kernels import gemv, step_attention\n"
        f"assert step_attention.available() == gemv.available() == ({level!r} != 'none')\n"
        "for dtype in t.TOLERANCES:\n"
        "    for size, kv_heads in ((64, 2), (128, 1), (36, 4)):\n"
        "        t.test_equals_the_definition(dtype, (600, 3), 4, kv_heads, size)\n"
        "for rows in (1, 2, 5, 8): g.test_bf16_equals_the_exact_product(rows, 33, 300)\n"
        "if gemv.available():\n"
        "  for rows in (1, 6): g.test_int8_equals_the_exact_product(torch.bfloat16, rows, 40, 256)\n"
    )
    run_at_level(level, code, root, tmp_path)
