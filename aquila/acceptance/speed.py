"""How fast this device is: its matrix products, its memory, and a training step beside both."""

import time
from collections.abc import Callable
from statistics import median
from types import ModuleType

import torch

from aquila.acceptance.table import Measured, Table


def check_speed(table: Table, backend: ModuleType, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Figures for people; the share of the data sheet's peak where the device's name is known."""
    small = device.type == "cpu"
    size = 1024 if small else 8192
    table.check("speed", f"matrix product {size}^3", lambda: _product(backend, device, dtypes[0], size))
    table.check("speed", "copy on the device", lambda: _copy(backend, device, 64 << 20 if small else 1 << 30))
    if not small:
        table.check("speed", "copy from the host", lambda: _from_host(backend, device, 256 << 20))


def seconds(function: Callable[[], object], synchronize: Callable[[], None], repeats: int = 5) -> float:
    """Median seconds of `repeats` calls, each several times long enough for the clock, after a warm-up."""
    function()
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    calls = max(1, int(0.02 / max(1e-6, time.perf_counter() - started)))
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        found.append((time.perf_counter() - started) / calls)
    return median(found)


def _product(backend: ModuleType, device: torch.device, dtype: torch.dtype, size: int) -> Measured:
    a, b = (torch.randn(size, size, dtype=torch.float32).to(dtype).to(device) for _ in range(2))
    rate = 2 * size**3 / seconds(lambda: a @ b, backend.synchronize) / 1e12
    peak = backend.peak_flops(dtype)
    detail = f"{rate * 1e12 / peak:.0%} of the data sheet's {peak / 1e12:.0f}" if peak else ""
    return Measured(rate, unit="TFLOP/s", detail=detail)


def _copy(backend: ModuleType, device: torch.device, size: int) -> Measured:
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    took = seconds(lambda: b.copy_(a), backend.synchronize)
    return Measured(2 * size / took / 1e9, unit="GB/s", detail="bytes read and written")


def _from_host(backend: ModuleType, device: torch.device, size: int) -> Measured:
    host = torch.ones(size, dtype=torch.uint8).pin_memory()
    there = torch.empty(size, dtype=torch.uint8, device=device)
    took = seconds(lambda: there.copy_(host, non_blocking=True), backend.synchronize)
    return Measured(size / took / 1e9, unit="GB/s", detail="pinned")
