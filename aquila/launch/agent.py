"""The agent of one node: starts torchrun, watches it, and leaves no process behind.

It talks to the controller in JSON lines: requests on standard input, events on standard output. When the
controller falls silent or closes the line, the agent stops its ranks (a checkpoint is saved when they
still can) and then kills what is left.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from aquila.core import run_folder
from aquila.core.errors import EXIT_USER_ERROR
from aquila.core.jsonl import JsonlTail
from aquila.core.lock import HeldError, take_lock
from aquila.core.paths import source_hash
from aquila.launch import failure, nodes
from aquila.launch.node_probe import NodeProbe
from aquila.launch.torchrun import NodeLaunchSpec, TorchrunProcess, kill_marked

TICK = 0.1
BEAT = 1.0
FAILURE_GRACE = 2.0
"""Seconds the other ranks have to write their own errors before they are killed."""


class ControllerLostError(Exception):
    pass


def machine_key() -> str:
    """Names this machine among those that share a disk: its addresses, whatever the hostfile calls it."""
    addresses = sorted(nodes.local_interfaces())
    return hashlib.sha256(" ".join([socket.gethostname(), *addresses]).encode()).hexdigest()[:12]


class Agent(NodeProbe):
    """One node's part of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = self.outbox = b""
        self.ranks: TorchrunProcess | None = None
        self.follower: JsonlTail | None = None
        self.failing_since: float | None = None
        self.stopping = False
        self.killed = False
        self.lock: Any = None
        self.state_path: Path | None = None
        self.state: dict[str, Any] = {}
        self.last_beat = 0.0
        self.last_heard = time.monotonic()
        self.node_timeout = 60.0
        self.controller_gone_at: float | None = None
        self.done = False

    # the line to the controller

    def send(self, event: str, **fields: Any) -> None:
        self.outbox += json.dumps({"event": event, **fields}).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Writes what the line takes without waiting: a dead line must not hold the agent."""
        if self.controller_gone_at is not None:
            self.outbox = b""
        try:
            while self.outbox:
                self.outbox = self.outbox[os.write(1, self.outbox) :]
        except BlockingIOError:
            return
        except OSError:
            self.lose_controller()

    def requests(self, timeout: float) -> list[dict[str, Any]]:
        if self.controller_gone_at is not None:
            time.sleep(timeout)
            return []
        ready, _, _ = select.select([0], [], [], timeout)
        if not ready:
            return []
        data = os.read(0, 1 << 20)
        if not data:
            self.lose_controller()
            return []
        self.last_heard = time.monotonic()
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]

    def lose_controller(self) -> None:
        if self.controller_gone_at is None:
            self.controller_gone_at = time.monotonic()
            self.stop()

    # requests

    def handle(self, request: dict[str, Any]) -> None:
        operation = request.pop("op")
        getattr(self, f"on_{operation}")(**request)

    def on_ping(self, time: float) -> None:
        self.send("pong", sent=time, time=wall_clock())

    def on_prepare(
        self,
        root: str,
        experiment: str,
        node: str,
        resume: str,
        version: str | None,
        node_timeout: float,
        run_id: str,
        takeover: bool,
    ) -> None:
        """Takes this node for the experiment; the first node chooses the version (`version` None).

        With `takeover` the node was given up before by the same run: an agent of that time goes first.
        """
        self.node_timeout = node_timeout
        folder = run_folder.experiment_dir(Path(root), experiment)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if takeover and version is not None:
                end_earlier_agent(folder / version / "launch" / f"node-{node}.json", run_id)
            try:
                self.lock = take_lock(folder / f".lock-{machine_key()}")
            except HeldError as holder:
                self.send(
                    "refused",
                    status=EXIT_USER_ERROR,
                    message=f"{experiment} is running on this node already ({holder}); stop it first with "
                    f"'bash scripts/local_stop_docker.sh {experiment}', or choose another name",
                )
                return
            resumed = False
            if version is None:
                version, resumed = run_folder.choose_version(folder, resume)
            run_dir = folder / version
            (run_dir / "launch").mkdir(parents=True, exist_ok=True)
            (run_dir / "logs").mkdir(exist_ok=True)
        except OSError as error:
            self.send("refused", status=1, message=f"{error.filename or folder}: {error.strerror}")
            return
        self.state_path = run_dir / "launch" / f"node-{node}.json"
        self.write_state(state="ready", node=node, experiment=experiment, version=version, run_id=run_id)
        self.send("prepared", version=version, run_dir=str(run_dir), resumed=resumed)

    def on_port(self, address: str) -> None:
        self.send("port", port=nodes.free_port(address))

    def on_start(self, first: bool, **fields: Any) -> None:
        start = NodeLaunchSpec(**fields)
        self.failing_since, self.stopping, self.killed = None, False, False
        self.follower = JsonlTail(Path(start.run_dir) / "metrics.jsonl") if first else None
        self.ranks = ranks = TorchrunProcess(start)
        self.write_state(
            state="running",
            generation=start.generation,
            ranks=[start.first_rank, start.first_rank + start.slots],
            mark=start.mark,
        )
        self.send("started", generation=start.generation, pid=ranks.process.pid)

    def on_stop(self) -> None:
        self.stop()

    def on_kill(self) -> None:
        self.kill()

    def on_end(self) -> None:
        self.kill()
        self.done = True

    # the ranks

    def stop(self) -> None:
        """Asks the ranks to save a checkpoint and leave."""
        if self.stopping:
            return
        self.stopping = True
        if self.ranks:
            self.write_state(state="stopping")
            self.ranks.signal_ranks(signal.SIGTERM)
        self.send("stopping")

    def kill(self) -> None:
        if self.ranks and not self.killed:
            self.killed = True
            left = self.ranks.kill()
            if left:
                self.send("left_behind", pids=left)

    def watch(self) -> None:
        if self.follower:
            for line in self.follower.new_lines():
                self.send("metric", metric=line)
        if not self.ranks:
            return
        if self.ranks.ended() or self.killed:
            self.finish(self.ranks)
            return
        records = self.ranks.finished_records()
        if self.failing_since is None and any(failure.is_failure(r["status"]) for r in records):
            self.failing_since = time.monotonic()
        if self.failing_since is not None and time.monotonic() - self.failing_since > FAILURE_GRACE:
            self.kill()

    def finish(self, ranks: TorchrunProcess) -> None:
        """torchrun has ended, by itself or by our hand: report, and clear away."""
        self.ranks = None
        records = ranks.all_records()
        left = ranks.kill()
        if self.follower:
            for line in self.follower.new_lines():
                self.send("metric", metric=line)
        status = failure.run_status([record["status"] for record in records])
        self.write_state(state="ended", status=status)
        self.send(
            "ended",
            generation=ranks.start.generation,
            records=records,
            left_behind=left,
            killed=self.killed and self.failing_since is None,
        )

    def write_state(self, **fields: Any) -> None:
        self.state.update(
            fields,
            pid=os.getpid(),
            started=start_of(os.getpid()),
            machine=machine_key(),
            host=socket.gethostname(),
            time=time.time(),
        )
        if self.state_path:
            with contextlib.suppress(OSError):  # a full disk must not stop the agent from clearing away
                run_folder.write_json(self.state_path, self.state)

    # the loop

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.set_blocking(1, False)
        self.send("hello", **introduction())
        try:
            while not self.done:
                for request in self.requests(TICK):
                    self.handle(request)
                self.watch()
                self.keep_in_touch()
                self.flush()
        finally:
            self.forget()
            self.kill()
            if self.ranks:
                self.finish(self.ranks)
            os.set_blocking(1, True)
            self.send("gone")

    def keep_in_touch(self) -> None:
        now = time.monotonic()
        if now - self.last_beat >= BEAT:
            self.last_beat = now
            self.send("beat", time=time.time(), running=self.ranks is not None)
        if self.controller_gone_at is None and now - self.last_heard > self.node_timeout:
            self.lose_controller()
        if self.controller_gone_at is not None:
            waited = now - self.controller_gone_at
            if self.ranks is None or waited > 2 * self.node_timeout:  # time for a last checkpoint
                self.done = True


def end_earlier_agent(state_path: Path, run_id: str) -> None:
    """Kills the agent that the same run had on this node before it was given up, ranks included."""
    state = run_folder.read_json(state_path)
    if not state or state.get("run_id") != run_id or state.get("machine") != machine_key():
        return
    if agent_alive(state):
        os.kill(state["pid"], signal.SIGKILL)
    if state.get("mark"):
        kill_marked(state["mark"])
    deadline = time.monotonic() + 5
    while agent_alive(state) and time.monotonic() < deadline:
        time.sleep(0.05)


def agent_alive(state: dict[str, Any]) -> bool:
    """Whether the process that wrote a node's state still run_dir."""
    with contextlib.suppress(psutil.Error):
        same = start_of(state["pid"]) == state.get("started")  # else the pid was given out again
        return same and psutil.Process(state["pid"]).status() != psutil.STATUS_ZOMBIE
    return False


def start_of(pid: int) -> str | None:
    """Boot of the machine, and ticks from there to the start of a process, which no clock moves."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {after_name[19]}"  # field 22 of proc_pid_stat(5)


def wall_clock() -> float:
    return time.time()


def introduction() -> dict[str, Any]:
    """What the controller needs to know of this node before it asks for anything."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "code": source_hash(),
        "python": sys.version.split()[0],
        "host": socket.gethostname(),
        "machine": machine_key(),
        "addresses": sorted(nodes.local_interfaces()),
        "reached_at": connection[2].split("%")[0] if len(connection) == 4 else None,
        "time": time.time(),
        "pid": os.getpid(),
    }


if __name__ == "__main__":
    Agent().run()
