"""The ranks of one node: torchrun, what became of each rank, and their end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from aquila.core.run_folder import read_json
from aquila.core.variables import LAUNCHED_CONFIG
from aquila.launch import failure, toolkit
from aquila.launch.nodes import interface_settings
from aquila.launch.rank_wrapper import RANK_SPEC, die_with_parent, log_path, record_path

MARK = "AQUILA_LAUNCH_MARK"
"""Set in the environment of every rank, and inherited by whatever a rank starts: how we find them all."""


@dataclass(frozen=True)
class NodeLaunchSpec:
    """One start of torchrun on one node. `generation` counts the starts of a run."""

    run_dir: str
    root: str
    node: str
    mark: str
    generation: int
    n_nodes: int
    node_rank: int
    first_rank: int
    slots: int
    master_address: str
    master_port: int
    address: str
    command: list[str]
    environment: dict[str, str]
    settings: str
    """The configuration that the launcher checked, as JSON: see `config.compare`."""


class TorchrunProcess:
    """The running torchrun of one `NodeLaunchSpec`."""

    def __init__(self, start: NodeLaunchSpec) -> None:
        self.start = start
        run_dir = Path(start.run_dir)
        self.logs = run_dir / "logs"
        self.records = run_dir / "launch" / "ranks"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(parents=True, exist_ok=True)
        self.world = range(start.first_rank, start.first_rank + start.slots)
        for rank in self.world:
            record_path(self.records, start.generation, rank).unlink(missing_ok=True)
        self.torchrun_log = self.logs / f"{start.node}-torchrun.log"
        with self.torchrun_log.open("ab") as log:
            self.log_offset = log.tell()
            self.process = subprocess.Popen(
                self._command(),
                cwd=start.root,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_own_session,
            )

    def _command(self) -> list[str]:
        start = self.start
        host = start.master_address
        return [
            sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={start.n_nodes}", f"--node-rank={start.node_rank}",
            f"--nproc-per-node={start.slots}",
            f"--master-addr={host}", f"--master-port={start.master_port}",
            f"--local-addr={start.address}",
            "--max-restarts=0",
            "--shutdown-timeout=86400",  # how long ranks may save is the agent's decision
            "-m", "aquila.launch.rank_wrapper",
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        start = self.start
        toolkit.set_up(start.environment)
        environment = dict(os.environ)
        for key, value in interface_settings(start.address, start.n_nodes == 1).items():
            environment.setdefault(key, value)
        # Without this every rank starts a thread per core, and the ranks wait for one another.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // start.slots)))
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [start.root, environment.get("PYTHONPATH", "")])
        )
        environment["PYTHONUNBUFFERED"] = "1"
        environment["PYTHONUTF8"] = "1"  # our files are UTF-8, whatever the node's locale
        environment[MARK] = start.mark
        environment[LAUNCHED_CONFIG] = start.settings
        orders = {
            "node": start.node,
            "logs": str(self.logs),
            "records": str(self.records),
            "generation": start.generation,
            "command": start.command,
        }
        environment[RANK_SPEC] = json.dumps(orders)
        return environment

    def ended(self) -> bool:
        return self.process.poll() is not None

    def finished_records(self) -> list[dict[str, Any]]:
        """One record per rank that has ended by itself, with its error text when it failed."""
        found = []
        for rank in self.world:
            record = read_json(record_path(self.records, self.start.generation, rank))
            if record is None:
                continue
            if failure.is_failure(record["status"]):
                record["error"] = failure.record_error(record)
            record.pop("own_error", None)
            found.append(record)
        return found

    def all_records(self) -> list[dict[str, Any]]:
        """As `finished_records`, for the ranks that left none as well. After torchrun has ended."""
        found = self.finished_records()
        known = {record["rank"] for record in found}
        torchrun_failed = self.process.returncode not in (0, None)
        for rank in self.world:
            if rank in known:
                continue
            log = log_path(self.logs, self.start.node, rank)
            shown = log if log.exists() else self.torchrun_log
            offset = 0 if log.exists() else self.log_offset
            found.append(
                {
                    "rank": rank,
                    "status": -signal.SIGKILL if log.exists() else 1,
                    "time": time.time(),
                    "node": self.start.node,
                    "log": str(shown),
                    "log_offset": offset,
                    "error": failure.error_text(shown, offset) if torchrun_failed else "left no record",
                }
            )
        return found

    def signal_ranks(self, number: signal.Signals) -> None:
        """Sends a signal to every rank (not to torchrun, which would answer by killing them)."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for wrapper in psutil.Process(self.process.pid).children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(wrapper.pid, number)

    def kill(self) -> list[int]:
        """Kills torchrun, the ranks, and what they started; the pids that are still there after 5 s."""
        self.signal_ranks(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return kill_marked(self.start.mark)


def _own_session() -> None:
    os.setsid()
    die_with_parent()


def marked_processes(mark: str) -> list[psutil.Process]:
    """Every process of this machine that carries our mark in its environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError, psutil.Error):
            if wanted in entry.read_bytes().split(b"\0"):
                process = psutil.Process(int(entry.parent.name))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def kill_marked(mark: str, wait: float = 5.0) -> list[int]:
    """Kills what carries the mark until nothing is left; returns the pids that would not go."""
    deadline = time.monotonic() + wait
    while left := marked_processes(mark):
        if time.monotonic() > deadline:
            break
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    return [process.pid for process in left]
