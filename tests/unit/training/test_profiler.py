"""The profile of a run's steps: which steps, what is written, what a device's kernels add up to."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aquila.backend import get_backend
from aquila.config.run import profiled_steps
from aquila.training.profiler import Kernel, Profiler, kernels_of, report


def kernel(name: str, start: float, end: float) -> Kernel:
    return Kernel(name, start * 1000, end * 1000)


def test_idle_time_pauses_and_communication_that_nothing_hid() -> None:
    kernels = [
        kernel("matmul", 0, 10),
        kernel("ncclDevKernel_ReduceScatter", 5, 14),  # 4 ms of it beside nothing
        kernel("copy", 6, 8),  # inside of another
        kernel("adamw", 18, 20),
    ]
    text = report(kernels, steps=2)
    assert "10.00 ms a step, 20.0% of it idle; communication that nothing hid: 2.00 ms" in text
    assert "5.000 ms" in next(line for line in text.splitlines() if "matmul" in line)
    assert "4.000 ms  after ncclDevKernel_ReduceScatter, before adamw" in text
    assert report([], 1) == ""


def test_events_of_the_host_and_of_the_user_are_no_kernels() -> None:
    def event(name: str, device: str, start: float, user: bool = False) -> SimpleNamespace:
        times = SimpleNamespace(start=start, end=start + 1)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, time_range=times, is_user_annotation=user)

    events = [
        event("late", "CUDA", 5), event("aten::mm", "CPU", 1), event("early", "CUDA", 2),
        event("step", "CUDA", 0, user=True),
    ]  # fmt: skip
    assert [k.name for k in kernels_of(events)] == ["early", "late"]


@pytest.mark.parametrize(("from_step", "until"), [(0, 9), (3, 9), (0, 3)])
def test_the_steps_that_were_asked_for_are_profiled(tmp_path: Path, from_step: int, until: int) -> None:
    """In a run that begins before them or among them, and in one that ends among them."""
    said: list[str] = []
    profiler = Profiler(range(3, 6), tmp_path / "profile", 1, get_backend("cpu"), said.append)
    for step in range(from_step + 1, until + 1):
        profiler.before(step)
        torch.ones(step, 8) @ torch.ones(8, 8)
        profiler.after(step)
    profiler.close(until)
    first, last = max(3, from_step + 1), min(5, until)
    stem = tmp_path / "profile" / f"step-{first}-rank-00001"
    assert said == [f"profile of steps {first} to {last}: {tmp_path / 'profile'}"]
    events = json.loads(gzip.decompress(Path(f"{stem}.trace.json.gz").read_bytes()))["traceEvents"]
    shapes = sum(event.get("name") == "aten::mm" for event in events)
    assert shapes == last - first + 1
    assert "aten::mm" in stem.with_suffix(".txt").read_text()


@pytest.mark.parametrize(("text", "steps"), [("3-5", range(3, 6)), ("7", range(7, 8))])
def test_steps(text: str, steps: range) -> None:
    assert profiled_steps(text) == steps


@pytest.mark.parametrize("text", ["", "-", "5-3", "0-2", "a-b", "1-1000", "1-2-3", "-4", "²-3"])
def test_what_is_no_range_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="profile"):
        profiled_steps(text)
