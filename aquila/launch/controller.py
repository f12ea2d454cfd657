"""The controller of one run: an agent on every node, starts, restarts, and the end.

Runs in a session of its own, so that training outlives the terminal. Told what to do by a JSON object on
standard input; says what happens in JSON lines on standard output until nobody reads them any more.
Signals: SIGTERM saves and stops, SIGUSR1 kills at once.
"""

import contextlib
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from aquila.core import run_folder
from aquila.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from aquila.core.paths import ROOT
from aquila.launch import failure
from aquila.launch.cluster import Cluster, NodeHandle, RunError

HELLO_TIMEOUT = 12.0
KILL_TIMEOUT = 15.0
STATUS_INTERVAL = 2.0
REJOIN_INTERVAL = 3.0


class Controller:
    """One run. The request's keys:

    nodes: `host`, `slots` and `here` of each; experiment, resume; command and arguments of a rank, between
    which `--version` comes; environment for the other nodes; settings, the configuration that every rank
    must find; node_timeout, rejoin_timeout, max_restarts, min_nodes (None: all).
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        members = [NodeHandle(i, n["host"], n["slots"], n["here"]) for i, n in enumerate(request["nodes"])]
        self.members = Cluster(members, self.say, request["node_timeout"])
        self.members.interrupted = lambda: self.kill_requested
        self.run_id = uuid.uuid4().hex[:12]
        self.version = ""
        self.run_dir = ""
        self.launch = 1
        self.generation = 0
        self.restarts = 0
        self.stop_requested = False
        self.kill_requested = False
        self.metric: dict[str, Any] = {}
        self.last_status = 0.0
        self.record: dict[str, Any] | None = None

    def say(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields}) + "\n"
        with contextlib.suppress(OSError):
            os.write(1, line.encode())

    def run(self) -> int:
        """The whole run; its exit status."""
        try:
            problems = self.members.connect(self.members.all, HELLO_TIMEOUT)
            if problems:
                raise RunError("\n  ".join(problems), EXIT_USER_ERROR)
            for member in self.members.all:
                self.prepare(member)
            status = self.train()
        except RunError as error:
            status = error.status
            self.say("end", status=status, message=str(error), record=self.record)
        else:
            self.say("end", status=status, record=self.record, run_dir=self.run_dir)
        self.write_status("ended", status)
        self.members.close()
        return status

    def prepare(self, member: NodeHandle, takeover: bool = False) -> None:
        """Takes a node for this experiment; the first one chooses the version."""
        answer = self.members.ask(
            member, "prepare", "prepared", root=str(ROOT), experiment=self.request["experiment"],
            node=member.name, resume=self.request["resume"], version=self.version or None,
            node_timeout=self.request["node_timeout"], run_id=self.run_id, takeover=takeover,
        )  # fmt: skip
        member.prepared = True
        if not self.version:
            self.version, self.run_dir = answer["version"], answer["run_dir"]
            self.launch = run_folder.launch_number(Path(self.run_dir).parent)
            self.say("version", version=self.version, run_dir=self.run_dir, resumed=answer["resumed"])

    def train(self) -> int:
        """Starts the ranks, and again after a failure while there are restarts left."""
        members = self.members.all
        while True:
            try:
                self.start(members)
                status = self.watch(members)
            except RunError as error:
                status, reason = error.status, str(error)
            else:
                reason = self.reason(members)
            lost = [member for member in members if not member.alive]
            if self.kill_requested or self.stop_requested or (not lost and status in (0, EXIT_USER_ERROR)):
                break
            if status == EXIT_STOPPED and not lost:
                break
            if self.restarts >= self.request["max_restarts"]:
                break
            self.restarts += 1
            self.say("info", text=f"{reason}; restart {self.restarts} of {self.request['max_restarts']}")
            members = self.gather()
        if lost and not self.kill_requested:
            raise RunError("; ".join(f"{m.host} is lost: {m.lost_reason}" for m in lost))
        if status == EXIT_FAILURE and self.record is None and reason and not self.kill_requested:
            raise RunError(reason)
        return status

    def reason(self, members: list[NodeHandle]) -> str:
        lost = [f"{member.host} is lost: {member.lost_reason}" for member in members if not member.alive]
        if lost or self.record is None:
            return "; ".join(lost)
        what = failure.describe_status(self.record["status"])
        last = self.record.get("error", "").splitlines()[-1:]
        return f"rank {self.record['rank']} on {self.record['node']} failed ({what}): {''.join(last)}"

    def gather(self) -> list[NodeHandle]:
        """The nodes for the next start: all of them, or enough once `rejoin_timeout` has passed.

        Raises `RunError` when too few are there.
        """
        everyone = self.members.all
        needed = self.request["min_nodes"] or len(everyone)
        deadline = time.monotonic() + self.request["rejoin_timeout"]
        missing = [member for member in everyone if not member.prepared]
        if missing:
            hosts = ", ".join(member.host for member in missing)
            self.say("info", text=f"waiting up to {self.request['rejoin_timeout']:.0f} s for {hosts}")
        while missing and time.monotonic() < deadline and not self.stop_requested and not self.kill_requested:
            self.members.connect(missing, min(HELLO_TIMEOUT, max(1.0, deadline - time.monotonic())))
            for member in missing:
                if member.alive:
                    with contextlib.suppress(RunError):
                        self.prepare(member, takeover=True)
                        self.say("info", text=f"{member.host} is back")
            self.members.lose_the_silent()
            missing = [member for member in everyone if not member.prepared]
            if missing:
                self.pause(REJOIN_INTERVAL)
        there = [member for member in everyone if member.prepared]
        if len(there) < needed:
            gone = "; ".join(f"{m.host} is lost: {m.lost_reason}" for m in missing)
            hint = "" if self.request["min_nodes"] else " (min_nodes lets a run go on with fewer)"
            raise RunError(f"{gone}; {len(there)} node(s) are left, {needed} are needed{hint}")
        if missing:
            self.say("info", text=f"going on with {len(there)} of {len(everyone)} nodes")
        return there

    def pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stop_requested and not self.kill_requested:
            self.members.next_events(0.2)
            self.keep_status()

    def start(self, members: list[NodeHandle]) -> None:
        """Starts torchrun on every node; the first one has the rendezvous."""
        self.generation += 1
        self.record = None
        for member in members:
            member.ended = None
        master = members[0]
        address = self.members.address_of(master)
        port = self.members.ask(master, "port", "port", address=address if len(members) > 1 else "")["port"]
        first_rank = 0
        for node_rank, member in enumerate(members):
            member.send(
                "start",
                first=node_rank == 0,
                run_dir=self.run_dir, root=str(ROOT), node=member.name,
                mark=f"{self.run_id}-{member.index}", generation=self.generation,
                n_nodes=len(members), node_rank=node_rank, first_rank=first_rank, slots=member.slots,
                master_address=address, master_port=port, address=self.members.address_of(member),
                command=[*self.request["command"], "--version", self.version, *self.request["arguments"]],
                environment={} if member.here else self.request["environment"],
                settings=self.request["settings"],
            )  # fmt: skip
            first_rank += member.slots

    def watch(self, members: list[NodeHandle]) -> int:
        """Follows one start to its end; its exit status. On a failure every node is cleared."""
        stopping = False
        kill_at = give_up_at = None
        while any(member.working for member in members):
            now = time.monotonic()
            if (self.stop_requested or self.kill_requested) and not stopping:
                stopping = True
                self.members.broadcast(members, "stop")
            failed = any(m.ended and _failed(m.ended["records"]) for m in members)
            if kill_at is None and (self.kill_requested or failed or not all(m.alive for m in members)):
                # The others only wait for the dead; a moment for their own last words.
                kill_at = now + (0 if self.kill_requested else 1)
            if kill_at is not None and now >= kill_at and give_up_at is None:
                self.members.broadcast([m for m in members if m.working], "kill")
                give_up_at = now + KILL_TIMEOUT
            for _, event in self.members.next_events(0.2):
                if event["event"] == "metric":
                    self.metric = event["metric"]
                    self.say("metric", metric=self.metric)
                elif event["event"] == "stopping":
                    self.stop_requested = True
            self.members.lose_the_silent()
            if give_up_at is not None and now > give_up_at:
                for member in members:
                    if member.working:
                        member.mark_lost("its ranks do not end")
            self.keep_status()
        return self.outcome(members)

    def outcome(self, members: list[NodeHandle]) -> int:
        """The exit status of one start, and the record of the rank that failed first."""
        ended = [member.ended for member in members if member.ended]
        records = [record for event in ended for record in event["records"]]
        own = [record for event in ended if not event["killed"] for record in event["records"]]
        status = failure.run_status([record["status"] for record in records])
        if self.stop_requested and all(r["status"] in (0, EXIT_STOPPED, -signal.SIGTERM) for r in records):
            if any(r["status"] == -signal.SIGTERM for r in records):
                raise RunError("stopped before training began: there was nothing to save")
        elif not self.kill_requested:
            self.record = failure.first_failure(own)
        if not all(member.alive for member in members) or len(ended) < len(members):
            return EXIT_FAILURE
        return EXIT_FAILURE if status == EXIT_USER_ERROR and self.record is None else status

    def keep_status(self) -> None:
        if time.monotonic() - self.last_status > STATUS_INTERVAL:
            self.write_status("running")

    def write_status(self, state: str, status: int | None = None) -> None:
        """`launch/status.json`, for `scripts/status.sh` on this machine."""
        self.last_status = time.monotonic()
        if not self.run_dir or not Path(self.run_dir).is_dir():
            return
        told = {
            "state": state,
            "status": status,
            "pid": os.getpid(),
            "time": time.time(),
            "launch": self.launch,
            "generation": self.generation,
            "restarts": self.restarts,
            "metric": self.metric,
            "nodes": [
                {
                    "host": member.host,
                    "slots": member.slots,
                    "alive": member.alive,
                    "running": member.working and self.generation > 0,
                    "lost": member.lost_reason,
                }
                for member in self.members.all
            ],
            "record": self.record,
        }
        with contextlib.suppress(OSError):
            run_folder.write_json(Path(self.run_dir) / run_folder.STATUS, told)


def _failed(records: list[dict[str, Any]]) -> bool:
    return any(failure.is_failure(record["status"]) for record in records)


def main() -> int:
    controller = Controller(json.load(sys.stdin))
    signal.signal(signal.SIGTERM, lambda *_: setattr(controller, "stop_requested", True))
    signal.signal(signal.SIGUSR1, lambda *_: setattr(controller, "kill_requested", True))
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    return controller.run()


if __name__ == "__main__":
    sys.exit(main())
