"""The controller of one run: an agent on every node, starts, restarts, and the end.

Runs in a session of its own, so that training outlives the terminal. Told what to do by a JSON object on
standard input; says what happens in JSON lines on standard output until nobody reads them any more.
Signals: SIGTERM saves and stops, SIGUSR1 kills at once.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from aquila.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from aquila.launch import failure, nodes, runs
from aquila.launch.channel import Channel
from aquila.launch.code import ROOT, code_fingerprint

HELLO_TIMEOUT = 12.0
KILL_TIMEOUT = 12.0
STATUS_INTERVAL = 2.0


class RunError(Exception):
    """The run cannot go on. `status` is its exit status."""

    def __init__(self, message: str, status: int = EXIT_FAILURE) -> None:
        super().__init__(message)
        self.status = status


class Member:
    """A node of the run, as the controller knows it."""

    def __init__(self, index: int, host: str, slots: int, here: bool) -> None:
        self.index, self.host, self.slots, self.here = index, host, slots, here
        self.name = host.replace(":", "_").replace("%", "_")
        self.channel: Channel | None = None
        self.hello: dict[str, Any] | None = None
        self.alive = False
        self.ended: dict[str, Any] | None = None
        self.lost_reason = ""


class Controller:
    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.members = [Member(i, n["host"], n["slots"], n["here"]) for i, n in enumerate(request["nodes"])]
        self.events: queue.Queue[tuple[int, dict]] = queue.Queue()
        self.run_id = uuid.uuid4().hex[:12]
        self.version = ""
        self.run_dir = ""
        self.generation = 0
        self.stop_requested = False
        self.kill_requested = False
        self.metric: dict[str, Any] = {}
        self.last_ping = self.last_status = 0.0
        self.record: dict[str, Any] | None = None

    # words to the launcher

    def say(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields}) + "\n"
        with contextlib.suppress(OSError):
            os.write(1, line.encode())

    # nodes

    def connect(self, members: list[Member], timeout: float) -> list[str]:
        """Opens a line to every node at once; what went wrong with each that did not answer."""
        for member in members:
            member.hello, member.alive, member.lost_reason = None, False, ""
            member.channel = Channel(member.index, member.host, member.here, self.events)
        deadline = time.monotonic() + timeout
        waiting = {member.index for member in members}
        while waiting and time.monotonic() < deadline and not self.kill_requested:
            for index, event in self.next_events(0.2):
                member = self.members[index]
                if event["event"] == "hello":
                    member.hello, member.alive = event, True
                    waiting.discard(index)
                elif event["event"] == "closed" and index in waiting:
                    member.lost_reason = member.channel.last_errors() or "the connection closed at once"
                    waiting.discard(index)
        problems = []
        mine = code_fingerprint()
        for member in members:
            if member.index in waiting:
                member.lost_reason = f"no answer within {timeout:.0f} s"
            if not member.alive:
                member.channel.close(0)
                problems.append(f"{member.host}: cannot be reached over ssh: {member.lost_reason}")
            elif member.hello["code"] != mine:
                problems.append(
                    f"{member.host}: {ROOT} holds another version of the code ({member.hello['code']}, here "
                    f"{mine}); bring it to the same commit"
                )
        return problems

    def next_events(self, timeout: float) -> list[tuple[int, dict]]:
        """Waits for events, answers the ones that need no thought, keeps the lines warm."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self.events.get(timeout=timeout))
            while True:
                found.append(self.events.get_nowait())
        now = time.monotonic()
        if now - self.last_ping > 1.0:
            self.last_ping = now
            for member in self.members:
                if member.alive:
                    member.channel.send("ping", time=time.time())
        if now - self.last_status > STATUS_INTERVAL:
            self.write_status("running")
        kept = []
        for index, event in found:
            member = self.members[index]
            if event["event"] == "closed" and event["channel"] != id(member.channel):
                continue  # of a line given up before
            if event["event"] == "left_behind" or event.get("left_behind"):
                pids = event.get("pids") or event["left_behind"]
                self.say("info", text=f"{member.host}: processes {pids} would not die")
            if event["event"] == "metric":
                self.metric = event["metric"]
                self.say("metric", metric=event["metric"])
            kept.append((index, event))
        return kept

    def ask(self, member: Member, operation: str, answer: str, timeout: float = 15.0, **fields: Any) -> dict:
        """A request whose answer is waited for. Raises `RunError` for a refusal or silence."""
        member.channel.send(operation, **fields)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not self.kill_requested:
            for index, event in self.next_events(0.2):
                if index != member.index:
                    continue
                if event["event"] == answer:
                    return event
                if event["event"] == "refused":
                    raise RunError(f"{member.host}: {event['message']}", event["status"])
                if event["event"] == "closed":
                    member.alive = False
                    raise RunError(f"{member.host}: the agent ended: {member.channel.last_errors()}")
        raise RunError(f"{member.host}: no answer to '{operation}' within {timeout:.0f} s")

    def prepare(self) -> None:
        """Takes every node for this experiment; the first one chooses the version."""
        request = self.request
        for member in self.members:
            answer = self.ask(
                member, "prepare", "prepared", root=str(ROOT), experiment=request["experiment"],
                node=member.name, resume=request["resume"], version=self.version or None,
                node_timeout=request["node_timeout"],
            )  # fmt: skip
            if not self.version:
                self.version, self.run_dir = answer["version"], answer["run_dir"]
                self.say(
                    "version", version=self.version, run_dir=self.run_dir, resumed=answer["resumed"],
                    pid=os.getpid(),
                )  # fmt: skip

    def address_of(self, member: Member) -> str:
        """The address under which the other nodes reach this one."""
        if len(self.members) == 1:
            return "127.0.0.1"
        if nodes.as_address(member.host):
            return member.host
        known = set(member.hello["addresses"])
        for found in nodes.resolve(member.host):
            if found in known and not nodes.as_address(found).is_loopback:
                return found
        if member.hello["reached_at"]:
            return member.hello["reached_at"]
        other = next(m for m in self.members if m is not member)
        return nodes.address_towards(other.host) or member.host

    # one start of all ranks

    def start(self, members: list[Member]) -> None:
        self.generation += 1
        master = members[0]
        address = self.address_of(master)
        port = self.ask(master, "port", "port", address=address if len(members) > 1 else "")["port"]
        first_rank = 0
        for node_rank, member in enumerate(members):
            member.ended = None
            member.channel.send(
                "start",
                first=node_rank == 0,
                run_dir=self.run_dir, root=str(ROOT), node=member.name,
                mark=f"{self.run_id}-{member.index}", generation=self.generation,
                n_nodes=len(members), node_rank=node_rank, first_rank=first_rank, slots=member.slots,
                master_address=address, master_port=port, address=self.address_of(member),
                command=[*self.request["command"], "--version", self.version, *self.request["arguments"]],
                environment={} if member.here else self.request["environment"],
            )  # fmt: skip
            first_rank += member.slots

    def watch(self, members: list[Member]) -> tuple[int, list[Member]]:
        """Follows one start to its end: its exit status, and the nodes lost on the way."""
        lost: list[Member] = []
        records: list[dict[str, Any]] = []
        stop_sent = kill_sent = None
        failing_since = None
        while any(m.alive and m.ended is None for m in members):
            if (self.stop_requested or self.kill_requested) and stop_sent is None:
                stop_sent = time.monotonic()
                self.tell(members, "stop")
            if self.kill_requested and kill_sent is None:
                kill_sent = time.monotonic()
                self.tell(members, "kill")
            for index, event in self.next_events(0.2):
                member = self.members[index]
                if event["event"] == "ended" and event["generation"] == self.generation:
                    member.ended = event
                    records += event["records"]
                elif event["event"] == "stopping":
                    self.stop_requested = True
                elif event["event"] == "closed" and member.alive:
                    self.lose(member, member.channel.last_errors() or "the connection closed", lost)
            for member in members:
                silent = time.monotonic() - member.channel.last_heard
                if member.alive and silent > self.request["node_timeout"]:
                    self.lose(member, f"silent for {silent:.0f} s", lost)
            failed = any(failure.is_failure(r["status"]) for r in records)
            if failing_since is None and (failed or lost):
                failing_since = time.monotonic()
                # The others only wait for the dead; their own errors are already in their logs.
                self.tell([m for m in members if m.ended is None], "kill", after=1.0)
            since = min(filter(None, (failing_since, kill_sent)), default=None)
            if since is not None and time.monotonic() - since > KILL_TIMEOUT:
                for member in members:
                    if member.alive and member.ended is None:
                        self.lose(member, "did not end its ranks", lost)
        self.record = failure.first_failure([r for r in records if not _killed_by_us(r, members)]) or (
            failure.first_failure(records) if not lost else None
        )
        if self.kill_requested:
            return EXIT_STOPPED if failure.run_status(
                [r["status"] for r in records]
            ) == EXIT_STOPPED else 1, lost
        if lost:
            return EXIT_FAILURE, lost
        return failure.run_status([record["status"] for record in records]), lost

    def tell(self, members: list[Member], operation: str, after: float = 0.0) -> None:
        deadline = time.monotonic() + after
        while time.monotonic() < deadline and any(m.alive and m.ended is None for m in members):
            time.sleep(0.1)
        for member in members:
            if member.alive:
                member.channel.send(operation)

    def lose(self, member: Member, reason: str, lost: list[Member]) -> None:
        member.alive, member.lost_reason = False, reason
        member.channel.close(0)
        lost.append(member)
        self.say("info", text=f"{member.host} is lost: {reason}")

    # the whole run

    def run(self) -> int:
        try:
            problems = self.connect(self.members, HELLO_TIMEOUT)
            if problems:
                raise RunError("\n  ".join(problems), EXIT_USER_ERROR)
            self.prepare()
            status = self.train()
        except RunError as error:
            self.say("end", status=error.status, message=str(error))
            status = error.status
        else:
            self.say("end", status=status, record=self.record, run_dir=self.run_dir)
        self.write_status("ended", status)
        self.close()
        return status

    def train(self) -> int:
        members = list(self.members)
        self.start(members)
        status, lost = self.watch(members)
        if lost and not self.kill_requested:
            reasons = "; ".join(f"{m.host}: {m.lost_reason}" for m in lost)
            raise RunError(f"lost {reasons}")
        return status

    def close(self) -> None:
        """Every agent clears its node and says so before its line is closed."""
        for member in self.members:
            if member.alive:
                member.channel.send("end")
        deadline = time.monotonic() + KILL_TIMEOUT
        waiting = {member.index for member in self.members if member.alive}
        while waiting and time.monotonic() < deadline:
            for index, event in self.next_events(0.1):
                if event["event"] in ("gone", "closed"):
                    waiting.discard(index)
        for member in self.members:
            if member.channel:
                member.channel.close()
        self.say("closed")

    def write_status(self, state: str, status: int | None = None) -> None:
        """`launch/status.json`, for `scripts/status.sh` on this machine."""
        self.last_status = time.monotonic()
        if not self.run_dir or not Path(self.run_dir).parent.is_dir():
            return
        with contextlib.suppress(OSError):
            runs.write_json(
                Path(self.run_dir) / "launch" / "status.json",
                {
                    "state": state,
                    "status": status,
                    "pid": os.getpid(),
                    "time": time.time(),
                    "generation": self.generation,
                    "metric": self.metric,
                    "nodes": [
                        {
                            "host": m.host,
                            "slots": m.slots,
                            "alive": m.alive,
                            "running": m.alive and m.ended is None and self.generation > 0,
                            "lost": m.lost_reason,
                        }
                        for m in self.members
                    ],
                    "record": self.record,
                },
            )


def _killed_by_us(record: dict[str, Any], members: list[Member]) -> bool:
    """Ranks that the agents killed because another had failed."""
    for member in members:
        if member.ended and record in member.ended["records"]:
            return member.ended["killed"]
    return False


def main() -> int:
    request = json.load(sys.stdin)
    controller = Controller(request)
    signal.signal(signal.SIGTERM, lambda *_: setattr(controller, "stop_requested", True))
    signal.signal(signal.SIGUSR1, lambda *_: setattr(controller, "kill_requested", True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return controller.run()


if __name__ == "__main__":
    sys.exit(main())
