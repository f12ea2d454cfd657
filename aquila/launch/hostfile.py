"""The hostfile: one node per line, `host slots=N`, as DeepSpeed and MPI write it."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from aquila.core.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?$")


@dataclass(frozen=True)
class Node:
    """A line of the hostfile."""

    host: str
    slots: int
    line: int

    @property
    def file_name(self) -> str:
        """The host as part of a file name (an IPv6 address has colons)."""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", self.host)


def as_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `host` spells out, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def read_hostfile(path: Path) -> list[Node]:
    """The nodes of a hostfile, in its order.

    Raises `UserError` that lists every malformed line and every duplicate, each with its line number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"hostfile {path} does not exist; write one line per node: 'localhost slots=2'"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {path}: cannot be read: {error}") from None
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, where: str) -> list[Node]:
    """`read_hostfile` for text that is already here; `where` names it in errors."""
    nodes: list[Node] = []
    problems: list[str] = []
    first_line: dict[object, int] = {}
    for number, raw in enumerate(text.split("\n"), start=1):  # as editors count lines
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        try:
            node = _parse_line(line, number)
        except ValueError as error:
            problems.append(f"{where}, line {number}: {error}")
            continue
        key = as_address(node.host) or node.host.lower().rstrip(".")
        if key in first_line:
            problems.append(
                f"{where}, line {number}: host {node.host} stands a second time (first in line "
                f"{first_line[key]}); give each node one line with all of its slots"
            )
            continue
        first_line[key] = number
        nodes.append(node)
    if problems:
        raise UserError("\n  ".join(problems))
    if not nodes:
        raise UserError(f"{where}: names no node; write one line per node: 'localhost slots=2'")
    return nodes


def _parse_line(line: str, number: int) -> Node:
    fields = line.split()
    host, settings = fields[0], fields[1:]
    if host.lower().startswith("slots"):
        raise ValueError(f"'{line}' has no host before its slots; write 'host slots=N'")
    _check_host(host)
    host = host[1:-1] if host.startswith("[") else host
    if len(settings) != 1:
        found = f"has '{' '.join(settings)}' after the host" if settings else "has no slots"
        raise ValueError(f"'{line}' {found}; write 'host slots=N'")
    key, _, value = settings[0].partition("=")
    if key != "slots" or not re.fullmatch(r"[0-9]+", value):
        raise ValueError(f"'{settings[0]}' is not 'slots=N' with N a whole number")
    slots = int(value)
    if slots < 1:
        raise ValueError(f"slots={value}: a node needs at least one slot; remove the line to leave it out")
    return Node(host, slots, number)


def _check_host(host: str) -> None:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if as_address(bare):
        return
    if "@" in host:
        raise ValueError(
            f"'{host}': the user's name belongs into ~/.ssh/config, the hostfile has hosts alone"
        )
    looks_numeric = re.fullmatch(r"[0-9.:]+", bare) is not None
    if looks_numeric or len(bare) > 253 or not _NAME.match(bare):
        kind = "an address" if looks_numeric or ":" in bare else "a host name or an address"
        raise ValueError(f"'{host}' is not {kind}")
