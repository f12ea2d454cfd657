"""The nodes of a run as its controller knows them: their lines, their state, requests and answers."""

import contextlib
import os
import queue
import time
from collections.abc import Callable
from typing import Any

from aquila.core.paths import ROOT, source_hash
from aquila.launch import nodes
from aquila.launch.channel import Channel
from aquila.launch.hostfile import Node

PING_INTERVAL = 1.0
CLOSE_TIMEOUT = 15.0


class RunError(Exception):
    """The run cannot go on. `status` is its exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class NodeHandle:
    """One node. `alive`: its agent answers; `ended`: what its ranks of this start ended with."""

    def __init__(self, index: int, host: str, slots: int, here: bool) -> None:
        self.index, self.host, self.slots, self.here = index, host, slots, here
        self.name = Node(host, slots, 0).file_name
        self.line: Channel | None = None
        self.hello: dict[str, Any] = {}
        self.alive = False
        self.prepared = False
        self.ended: dict[str, Any] | None = None
        self.lost_reason = ""

    @property
    def channel(self) -> Channel:
        """The line to it, once `Cluster.open` was called."""
        assert self.line is not None
        return self.line

    @property
    def working(self) -> bool:
        return self.alive and self.ended is None

    def send(self, operation: str, **fields: Any) -> None:
        if self.alive:
            self.channel.send(operation, **fields)

    def mark_lost(self, reason: str) -> None:
        """Gives the node up: whatever happens there, its agent cleans up by itself."""
        self.alive, self.prepared, self.lost_reason = False, False, reason
        self.channel.close(0)


class Cluster:
    """All nodes of a run, and the one queue that their events arrive in."""

    def __init__(self, members: list[NodeHandle], say: Callable[..., None], node_timeout: float) -> None:
        self.all = members
        self.say = say
        self.node_timeout = node_timeout
        self.events: queue.Queue[tuple[int, dict]] = queue.Queue()
        self.interrupted: Callable[[], bool] = lambda: False
        self.last_ping = self.opened = 0.0

    def connect(self, members: list[NodeHandle], timeout: float) -> list[str]:
        """Opens a line to every one at once; what went wrong with each that did not answer well."""
        self.open(members)
        return self.wait_for_hello(members, timeout)

    def open(self, members: list[NodeHandle]) -> None:
        """Starts a line to every one, and waits for none."""
        for member in members:
            member.hello, member.alive, member.prepared = {}, False, False
            member.line = Channel(member.index, member.host, member.here, self.events)
        self.opened = time.monotonic()

    def wait_for_hello(self, members: list[NodeHandle], timeout: float) -> list[str]:
        """Waits for every one until `timeout` seconds after `open`; what went wrong with which."""
        closed: set[int] = set()
        in_time = True
        while in_time and not self.interrupted():
            in_time = time.monotonic() < self.opened + timeout
            for member, event in self.next_events(0.1):
                if event["event"] == "closed":
                    closed.add(member.index)
            if all(m.alive or m.index in closed for m in members):
                break
        problems = [self._greeting_problem(m, m.index in closed, timeout) for m in members]
        return [*filter(None, problems), *self._same_machines()]

    def _same_machines(self) -> list[str]:
        """Two lines of the hostfile that lead to one machine, under whatever names."""
        first: dict[str, NodeHandle] = {}
        problems = []
        for member in self.all:
            if not member.alive:
                continue
            known = first.setdefault(member.hello["machine"], member)
            if known is not member:
                member.mark_lost(f"the same machine as {known.host}")
                problems.append(
                    f"{member.host} is the same machine as {known.host}; give it one line of the hostfile "
                    "with all of its slots"
                )
        return problems

    def _greeting_problem(self, member: NodeHandle, closed: bool, timeout: float) -> str | None:
        if not member.alive:
            said = member.channel.last_errors() if closed else f"no answer within {timeout:.0f} s"
            member.mark_lost(said or "the connection closed at once")
            transport = os.environ.get("AQUILA_TRANSPORT", "ssh")
            return f"{member.host}: cannot be reached over {transport}: {member.lost_reason}"
        if member.hello["code"] != source_hash():
            member.mark_lost("another version of the code")
            return (
                f"{member.host}: {ROOT} holds another version of the code ({member.hello['code']}, here "
                f"{source_hash()}); bring both to the same commit"
            )
        return None

    def next_events(self, timeout: float) -> list[tuple[NodeHandle, dict]]:
        """Waits for events and notes in each member what they mean; keeps the lines warm."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self.events.get(timeout=timeout))
            while True:
                found.append(self.events.get_nowait())
        if time.monotonic() - self.last_ping > PING_INTERVAL:
            self.last_ping = time.monotonic()
            for member in self.all:
                member.send("ping", time=time.time())
        kept = []
        for index, event in found:
            member = self.all[index]
            if event.pop("channel") != id(member.channel):
                continue  # of a line given up before
            self._note(member, event)
            kept.append((member, event))
        return kept

    def _note(self, member: NodeHandle, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "hello":
            member.hello, member.alive = event, True
        elif kind == "ended":
            member.ended = event
        elif kind == "closed" and member.alive:
            member.mark_lost(member.channel.last_errors() or "its agent ended")
        if left := event.get("left_behind"):
            self.say("info", text=f"{member.host}: processes {left} would not die")

    def lose_the_silent(self) -> None:
        """Gives up the nodes that gave no sign of life for too long."""
        for member in self.all:
            if member.alive:
                silent = time.monotonic() - member.channel.last_heard
                if silent > self.node_timeout:
                    member.mark_lost(f"no sign of life for {silent:.0f} s")

    def ask(
        self, member: NodeHandle, operation: str, answer: str, timeout: float = 15.0, **fields: Any
    ) -> dict:
        """A request whose answer is waited for. Raises `RunError` for a refusal or silence."""
        member.send(operation, **fields)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not self.interrupted():
            for sender, event in self.next_events(0.1):
                if sender is member and event["event"] == answer:
                    return event
                if sender is member and event["event"] == "refused":
                    raise RunError(f"{member.host}: {event['message']}", event["status"])
            if not member.alive:
                raise RunError(f"{member.host} is lost: {member.lost_reason}")
        raise RunError(f"{member.host}: no answer to '{operation}' within {timeout:.0f} s")

    def broadcast(self, members: list[NodeHandle], operation: str) -> None:
        for member in members:
            member.send(operation)

    def close(self) -> None:
        """Every agent clears its node and says so before its line is closed."""
        self.next_events(0)  # who has greeted meanwhile
        self.broadcast(self.all, "end")
        deadline = time.monotonic() + CLOSE_TIMEOUT
        waiting = {member.index for member in self.all if member.alive}
        while waiting and time.monotonic() < deadline:
            for member, event in self.next_events(0.1):
                if event["event"] in ("gone", "closed"):
                    waiting.discard(member.index)
        lines = [member.line for member in self.all if member.line]
        for line in lines:
            line.end()
        deadline = time.monotonic() + 1
        for line in lines:
            line.close(max(0.05, deadline - time.monotonic()))

    def address_of(self, member: NodeHandle) -> str:
        """The address under which the other nodes reach this one."""
        if len(self.all) == 1:
            return "127.0.0.1"
        spelt = nodes.as_address(member.host)
        if spelt and not spelt.is_loopback:
            return member.host
        known = set(member.hello["addresses"])
        for found in nodes.resolve(member.host):
            address = nodes.as_address(found)
            if found in known and address and not address.is_loopback:
                return found
        if member.hello["reached_at"]:
            return member.hello["reached_at"]
        other = next(m for m in self.all if m is not member)
        return nodes.address_towards(other.hello["reached_at"] or other.host) or member.host
