"""The foreground of a launch: starts the controller, shows what it reports, leaves or stays."""

import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from aquila.core.errors import EXIT_FAILURE, EXIT_STOPPED
from aquila.core.paths import ROOT
from aquila.launch import failure
from aquila.launch.advice import advice
from aquila.launch.display import Display, boxed, width_of


def launch(request: dict[str, Any], wait: bool, total_steps: int | None = None) -> int:
    """Starts a run and follows it: to its first logged step, or with `wait` to its end.

    request: see `controller.Controller`. Returns the exit status for the terminal. Ctrl-C asks the run
    to save and stop; a second one kills it.
    """
    controller = subprocess.Popen(
        [sys.executable, "-m", "aquila.launch.controller"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=_environment(),
    )
    assert controller.stdin is not None
    controller.stdin.write(json.dumps(request).encode())
    controller.stdin.close()
    return LaunchMonitor(controller, request, wait, total_steps).to_the_end()


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


class LaunchMonitor:
    """The launcher's view of a running controller."""

    def __init__(
        self, controller: subprocess.Popen, request: dict[str, Any], wait: bool, total_steps: int | None
    ) -> None:
        self.controller, self.request, self.wait = controller, request, wait
        self.display = Display(total_steps)
        self.interrupts = 0
        self.stepped = False
        self.run_dir = ""
        self.status: int | None = None
        self.left = False

    def to_the_end(self) -> int:
        previous = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.display:
                for event in self._events():
                    self._show(event)
                    if self.left:
                        return 0
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.status is None:
            self.controller.wait()
            assert self.controller.stderr is not None
            trace = self.controller.stderr.read().decode("utf-8", errors="replace").strip()
            self.display.text(f"error: the run's controller ended unexpectedly\n{trace}", error=True)
            return EXIT_FAILURE
        return self.status

    def _events(self):
        # Through a selector, so that a signal's handler runs at once while nothing arrives.
        stream = self.controller.stdout
        selector = selectors.DefaultSelector()
        selector.register(stream, selectors.EVENT_READ)
        buffer = b""
        while True:
            if not selector.select(0.2):
                continue
            data = stream.read1(1 << 16)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                yield json.loads(line)

    def _interrupt(self, number: int, *_: object) -> None:
        self.interrupts += 1
        # Before the first step Ctrl-C has nothing to save; SIGTERM is a scheduler's, and may be a step late.
        if self.interrupts == 1 and (self.stepped or number == signal.SIGTERM):
            self.display.text("stopping: a checkpoint is saved first; once more to kill at once")
            self.controller.send_signal(signal.SIGTERM)
        else:
            self.display.text("killing every rank")
            self.controller.send_signal(signal.SIGUSR1)

    def _show(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "info":
            self.display.text(event["text"])
        elif kind == "version":
            self.run_dir = event["run_dir"]
            continues = "continues" if event["resumed"] else "writes to"
            self.display.text(f"run {continues} {_short(self.run_dir)}")
        elif kind == "metric":
            self.display.metric(event["metric"])
            if "step" in event["metric"] and not self.stepped:
                self.stepped = True
                self._leave_if_wanted()
        elif kind == "end":
            self._end(event)

    def _leave_if_wanted(self) -> None:
        if self.wait or self.interrupts:
            return
        name = self.request["experiment"]
        self.left = True
        self.display.text(
            f"training goes on in the background; logs: {_short(self.run_dir)}/logs/\n"
            f"look: bash scripts/status.sh {name}    stop: {self.request['stop_command']}"
        )

    def _end(self, event: dict[str, Any]) -> None:
        self.status = event["status"]
        if event.get("message"):
            self.display.text(f"error: {event['message']}", error=True)
            return
        if record := event.get("record"):
            self.display.text(failure_box(record, width_of(sys.stderr)), error=True)
        elif self.status == EXIT_STOPPED:
            self.display.text(
                f"stopped, checkpoint saved; the same command continues ({_short(self.run_dir)})"
            )
        elif self.status == 0:
            self.display.text(done_text(self.display.first, self.display.last, self.run_dir))
        else:
            self.display.text("killed before the end", error=True)


def failure_box(record: dict[str, Any], width: int | None) -> str:
    """The failing rank's own words, three things to try, and where the whole log is."""
    title = (
        f"error: rank {record['rank']} on {record['node']} failed first "
        f"({failure.describe_status(record['status'])})"
    )
    steps = [f"{number}. {step}" for number, step in enumerate(advice(record).steps, 1)]
    error = record.get("error", "").splitlines()
    return boxed(title, [*error, "", "try:", *steps, f"the whole log: {_short(record['log'])}"], width)


def done_text(first: dict[str, Any], last: dict[str, Any], run_dir: str) -> str:
    """The last words of a run that has reached its end: what it came to, and what to do with it."""
    name, python = Path(run_dir).parent.name, _short(sys.executable)
    parts = [f"{last['step']} steps"] if last else []
    if last.get("loss") is not None and first.get("loss") is not None:
        parts.append(f"loss {first['loss']:.4f} to {last['loss']:.4f}")
    result = f"{', '.join(parts)}; " if parts else ""
    return (
        f"done: {result}{_short(run_dir)}\n"
        f"  talk      {python} generate.py --model-dir checkpoints_out/{name}\n"
        f"  report    {python} -m aquila.report {name}\n"
        "  continue  the same command with a larger train_iters or epochs"
    )


def _short(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
