"""`profile: START-END`: what the device did in those steps, as a trace and as a table.

Every rank writes into `RUN/profile/`: `step-START-rank-00000.trace.json.gz` for chrome://tracing or Perfetto,
and `.txt` with the longest kernels, the device's idle share, its longest pauses and the communication that
nothing hid; on a GPU `.memory.pickle` as well, for pytorch.org/memory_viz. Profiled steps are slower.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

COMMUNICATION = re.compile(r"[nh]ccl|hcom|all_?reduce|all_?gather|reduce_?scatter", re.IGNORECASE)
"""What stands in the names of kernels that communicate."""
LONGEST = 10


@dataclass(frozen=True)
class Kernel:
    """One piece of work on a device: its name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float

    @property
    def communicates(self) -> bool:
        return COMMUNICATION.search(self.name) is not None


class Profiler:
    """Profiles the steps of `steps`, which the trainer announces by `before` and `after`.

    backend: of the rank's device. say: takes the line that says where the profile lies.
    """

    def __init__(
        self, steps: range, folder: Path, rank: int, backend: ModuleType, say: Callable[[str], None]
    ) -> None:
        self._steps, self._backend, self._say = steps, backend, say
        self._folder, self._rank = folder, rank
        self._running = ExitStack()
        self._profile: Any = None

    def before(self, step: int) -> None:
        """A step begins: the first one of a run in `steps`, wherever it was resumed, starts the profile."""
        if self._profile is None and step in self._steps:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stem = self._folder / f"step-{step}-rank-{self._rank:05d}"
            self._first = step
            self._profile = self._running.enter_context(self._backend.profiling(self._stem))

    def after(self, step: int) -> None:
        """A step is done: the last one of `steps` ends the profile."""
        if self._profile is not None and step == self._steps[-1]:
            self.close(step)

    def close(self, step: int) -> None:
        """Ends a profile that runs, after `step`, and writes what it found."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        self._running.close()
        events = getattr(profile, "events", None)  # torch_npu's profiler writes its own tables
        text = report(kernels_of(events()), step - self._first + 1) if events else ""
        self._stem.with_suffix(".txt").write_text(text + table(profile), encoding="utf-8")
        self._say(f"profile of steps {self._first} to {step}: {self._folder}\n{text}".rstrip())


def kernels_of(events: Iterable[Any]) -> list[Kernel]:
    """What ran on a device, in the order of its start, of the events of `torch.profiler`."""
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name != "CPU" and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def report(kernels: list[Kernel], steps: int) -> str:
    """Busy and idle time a step, exposed communication, longest pauses and kernels; '' without a device."""
    if not kernels:
        return ""
    first, last = kernels[0].start, max(kernel.end for kernel in kernels)
    busy, pauses = _union(kernels)
    exposed = busy - _union([kernel for kernel in kernels if not kernel.communicates])[0]
    lines = [
        f"device: {(last - first) / steps / 1e3:.2f} ms a step, {1 - busy / (last - first):.1%} of it idle; "
        f"communication that nothing hid: {exposed / steps / 1e3:.2f} ms"
    ]
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.end - kernel.start)
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]:
        lines.append(f"  {sum(times) / steps / 1e3:9.3f} ms  {len(times) / steps:6.0f} x  {name[:76]}")
    lines.append("longest pauses:")
    for length, before, after in sorted(pauses, reverse=True)[:5]:
        lines.append(f"  {length / 1e3:9.3f} ms  after {before[:36]}, before {after[:36]}")
    return "\n".join(lines) + "\n"


def _union(kernels: list[Kernel]) -> tuple[float, list[tuple[float, str, str]]]:
    """Microseconds in which any kernel ran, and the pauses: length, the kernel before, the kernel after."""
    busy, pauses = 0.0, []
    until, latest = None, ""
    for kernel in kernels:
        if until is not None and kernel.start > until:
            pauses.append((kernel.start - until, latest, kernel.name))
        begin = kernel.start if until is None else max(kernel.start, until)
        if until is None or kernel.end > until:
            busy += kernel.end - begin
            until, latest = kernel.end, kernel.name
    return busy, pauses


def table(profile: Any) -> str:
    """The operations that took longest, on a host or with what they started on the device."""
    if not hasattr(profile, "key_averages"):
        return ""
    averages = profile.key_averages()
    on_device = any(getattr(row, "self_device_time_total", 0) for row in averages)
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    return averages.table(sort_by=order, row_limit=25, max_name_column_width=60)
