"""The checks of every host of a run, over the same lines that a run uses."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aquila.config.cross_checks import FP8_RUNS
from aquila.core.errors import UserError
from aquila.core.paths import ROOT
from aquila.launch.cluster import Cluster, NodeHandle
from aquila.launch.device_probe import mismatches
from aquila.launch.fabric import fabric_problems
from aquila.launch.hostfile import read_hostfile
from aquila.launch.nodes import forwarded_environment, is_this_node
from aquila.preflight.local import (
    CheckWarning,
    PreflightReport,
    check_room,
    checkpoint_bytes,
    data_paths,
    small_paths,
)

CLOCK_TOLERANCE = 5.0
CONNECT_TIMEOUT = 12.0
PROBE_TIMEOUT = 60.0
REACH_TIMEOUT = 3.0


@contextlib.contextmanager
def connect_hosts(hostfile: Path) -> Iterator[Cluster | None]:
    """Lines to all hosts, opened while this machine is still checked; None for a hostfile with mistakes.

    On leaving every line is closed, and nothing is left on the hosts.
    """
    try:
        nodes = read_hostfile(hostfile)
    except UserError:
        yield None
        return
    members = [NodeHandle(i, node.host, node.slots, is_this_node(node.host)) for i, node in enumerate(nodes)]
    group = Cluster(members, lambda *_, **__: None, node_timeout=PROBE_TIMEOUT)
    group.open(members)
    try:
        yield group
    finally:
        group.close()


def check_hosts(checked: PreflightReport, group: Cluster) -> dict[str, list[Path]]:
    """Every host: reachable, of one kind, with enough devices and room, seeing the others and the disk.

    Returns, for each host, what of configuration and model folder differs there or is missing.
    """
    hosts = Hosts(group, checked)
    hosts.check()
    return hosts.differing


class Hosts:
    def __init__(self, group: Cluster, checked: PreflightReport) -> None:
        self.group, self.members, self.checked = group, group.all, checked
        config = checked.merged
        self._fp8 = config.run.fp8 if config else False
        self.small = small_paths(config) if config else []
        self.data = data_paths(config, ROOT) if config else []
        self.disk_needed = checkpoint_bytes(config) if config else 0
        self.output = ROOT / "checkpoints_out"
        self.answers: dict[int, dict[str, Any]] = {}
        self.differing: dict[str, list[Path]] = {}

    @property
    def there(self) -> list[NodeHandle]:
        return [member for member in self.members if member.alive]

    def check(self) -> None:
        run = self.checked.run
        problems = self.group.wait_for_hello(self.members, CONNECT_TIMEOUT)
        run("hosts reached", lambda: self._raise(problems, f"{len(self.members)} over ssh"))
        if not self.there:
            return
        run("clocks", self._clocks)
        self._probe()
        run("devices of hosts", self._devices)
        run("versions of hosts", self._versions)
        if found := {
            m.host: a["fabric"] for m in self.there if (a := self.answers.get(m.index, {})).get("fabric")
        }:
            run("devices' network", lambda: self._fabric(found))
        run("files on hosts", self._files)
        run("disk space", self._disk)
        if len(self.there) > 1:
            run("shared disk", self._shared)
            run("network", self._network)

    def _probe(self) -> None:
        known = self.checked.devices  # this machine has been asked already
        paths = [str(path) for path in (*self.small, *self.data)]
        environment = forwarded_environment()
        self.answers = self.ask_all(
            self.there, "probe", "probed", PROBE_TIMEOUT,
            lambda m: {
                "paths": paths,
                "output": str(self.output),
                "devices": not (m.here and known),
                "slots": m.slots,
                "environment": environment,
            },
        )  # fmt: skip
        for member in self.there:
            if member.here and known and member.index in self.answers:
                self.answers[member.index]["devices"] = known

    def ask_all(
        self,
        members: list[NodeHandle],
        operation: str,
        answer: str,
        timeout: float,
        fields: Callable[[NodeHandle], dict[str, Any]],
    ) -> dict[int, dict[str, Any]]:
        """One question to many nodes at once; the answers by node index."""
        for member in members:
            member.send(operation, **fields(member))
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and any(m.alive and m.index not in answers for m in members):
            for sender, event in self.group.next_events(0.1):
                if event["event"] == answer:
                    answers[sender.index] = event
        return answers

    def _raise(self, problems: list[str], fine: str) -> str:
        if problems:
            raise UserError("\n  ".join(problems))
        return fine

    def _clocks(self) -> str:
        pongs = self.ask_all(self.there, "ping", "pong", 5, lambda _: {"time": time.time()})
        apart = {
            m.host: pongs[m.index]["time"] - pongs[m.index]["sent"] for m in self.there if m.index in pongs
        }
        return self._raise(clock_problems(apart), f"within {CLOCK_TOLERANCE:.0f} s of this machine's")

    def _devices(self) -> str:
        problems = []
        for member in self.there:
            answer = self.answers.get(member.index)
            if answer is None:
                problems.append(f"{member.host}: no answer about its devices within {PROBE_TIMEOUT:.0f} s")
            elif "problem" in answer:
                problems.append(f"{member.host}: {answer['problem']}")
            elif answer["devices"]["count"] < member.slots:
                devices = answer["devices"]
                problems.append(
                    f"{member.host}: slots={member.slots} in the hostfile, but it has {devices['count']} "
                    f"({devices['device']}: {devices['name']}); write slots={devices['count']} or fewer"
                )
            elif self._fp8 and answer["devices"]["fp8"] not in FP8_RUNS:
                problems.append(f"{member.host}: fp8: {self._fp8}: {answer['devices']['fp8']}")
        return self._raise(
            problems, f"{sum(member.slots for member in self.there)} slots, each with a device"
        )

    def _probed(self) -> list[tuple[NodeHandle, dict[str, Any]]]:
        return [
            (m, self.answers[m.index])
            for m in self.there
            if m.index in self.answers and "devices" in self.answers[m.index]
        ]

    def _versions(self) -> str:
        probed = self._probed()
        if not probed:
            raise CheckWarning("not known: no host answered")
        first, reference = probed[0][0], _comparable(probed[0][1])
        problems = [
            f"{m.host}: {text}"
            for m, answer in probed
            if not m.here
            for text in mismatches(answer["devices"])
        ]
        for member, answer in probed[1:]:
            mine = _comparable(answer)
            for key in sorted(reference.keys() | mine.keys()):
                if reference.get(key) != mine.get(key):
                    problems.append(
                        f"{member.host} has {key} {mine.get(key, 'missing')}, {first.host} has "
                        f"{reference.get(key, 'missing')}; bring both to the same (scripts/install.sh)"
                    )
        return self._raise(problems, ", ".join(f"{k} {v}" for k, v in reference.items()))

    def _fabric(self, found: dict[str, dict[str, Any]]) -> str:
        errors, warnings = fabric_problems(found, len(self.members))
        fine = self._raise(errors, f"links and TLS of {len(found)} host(s)")
        if warnings:
            raise CheckWarning("; ".join(warnings))
        return fine

    def _files(self) -> str:
        here = next((m for m, _ in self._probed() if m.here), None)
        copied: list[str] = []
        problems: list[str] = []
        for path in (*self.small, *self.data):
            wanted = self._print(here, path) if here else None
            for member, _ in self._probed():
                found = self._print(member, path)
                if found is not None and wanted in (found, None):
                    continue
                text = f"{member.host}: {path} {'is missing' if found is None else 'differs'}"
                if path in self.small and here:
                    self.differing.setdefault(member.host, []).append(path)
                    copied.append(text)
                else:
                    problems.append(f"{text}; put it there, or on a disk that the nodes share")
        if copied and not problems:
            raise CheckWarning("copied at the start: " + "; ".join(copied))
        return self._raise(problems, f"{len(self.small) + len(self.data)} alike on every node")

    def _print(self, member: NodeHandle, path: Path) -> str | None:
        return self.answers[member.index]["fingerprints"][str(path)]

    def _disk(self) -> str:
        first = self.there[0]
        answer = self.answers.get(first.index)
        if answer is None:
            raise CheckWarning(f"not known: {first.host} did not answer")
        try:
            return check_room(self.output, answer["free"], answer["writable"], self.disk_needed)
        except UserError as error:
            raise UserError(f"{first.host}: {error}") from None

    def _shared(self) -> str:
        first, *others = self.there
        token = self.ask_all([first], "write_token", "token", 10, lambda _: {"folder": str(self.output)})
        answer = token.get(first.index, {"problem": "no answer"})
        if not answer.get("path"):
            raise UserError(f"{first.host}: {answer['problem']}")
        seen = self.ask_all(others, "read_token", "token_read", 10, lambda _: {"path": answer["path"]})
        blind = [m.host for m in others if not seen.get(m.index, {}).get("found")]
        if blind:
            raise UserError(
                f"{self.output} must be one folder that all nodes share (NFS, Lustre, ...): a file written "
                f"on {first.host} is not seen on {', '.join(blind)}; mount the shared disk there, or make "
                f"{self.output} a link into it on every node"
            )
        return f"{self.output} is the same on every node"

    def _network(self) -> str:
        addresses = {m.index: self.group.address_of(m) for m in self.there}
        listening = self.ask_all(
            self.there, "listen", "listening", 10, lambda m: {"address": addresses[m.index]}
        )
        problems = []
        targets: list[tuple[str, int]] = []
        for member in self.there:
            answer = listening.get(member.index, {"port": None, "problem": "no answer"})
            if answer["port"] is None:
                problems.append(
                    f"{member.host}: no port can be opened on {addresses[member.index]}: {answer['problem']}"
                )
            else:
                targets.append((addresses[member.index], answer["port"]))
        reached = self.ask_all(
            self.there, "reach", "reached", REACH_TIMEOUT + 10,
            lambda _: {"others": targets, "timeout": REACH_TIMEOUT},
        )  # fmt: skip
        for member in self.there:
            for target, problem in reached.get(member.index, {"problems": {}})["problems"].items():
                problems.append(
                    f"{member.host} cannot reach {target} over TCP ({problem}); open the firewall there"
                )
        return self._raise(problems, "every node reaches every other")


def clock_problems(apart: dict[str, float]) -> list[str]:
    """The hosts whose clock is too many seconds from this machine's: checkpoints and logs carry times."""
    return [
        f"{host}: its clock is {offset:+.0f} s from this machine's; set it (chrony, ntp)"
        for host, offset in apart.items()
        if abs(offset) > CLOCK_TOLERANCE
    ]


def _comparable(answer: dict[str, Any]) -> dict[str, str]:
    devices = answer["devices"]
    return {**devices["versions"], "device": f"{devices['device']} ({devices['name']})"}
