"""Protects: what a hostfile may say, and that every mistake in it is found, with its line."""

from pathlib import Path

import pytest

from aquila.core.errors import UserError
from aquila.launch.hostfile import Node, parse_hostfile, read_hostfile


def test_comments_blank_lines_names_and_both_kinds_of_address() -> None:
    text = "# nodes\n\n10.0.0.1 slots=8\nnode-2.cluster   slots=4 # old\n[fd00::2] slots=2\nfd00::3 slots=1\n"
    assert parse_hostfile(text, "hostfile") == [
        Node("10.0.0.1", 8, 3),
        Node("node-2.cluster", 4, 4),
        Node("fd00::2", 2, 5),
        Node("fd00::3", 1, 6),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("node1", "has no slots"),
        ("node1 slots=", "not 'slots=N'"),
        ("node1 slots=two", "not 'slots=N'"),
        ("node1 slots=-1", "not 'slots=N'"),
        ("node1 slots=²", "not 'slots=N'"),
        ("node1 slots=0", "at least one slot"),
        ("node1 slots=1 max_slots=2", "after the host"),
        ("node1:2", "is not an address or a name"),
        ("slots=2", "no host"),
        ("10.0.0.300 slots=1", "not an address"),
        ("10.0.0 slots=1", "not an address"),
        ("fd00:::1 slots=1", "not an address"),
        ("me@node slots=1", "~/.ssh/config"),
        ("-oProxyCommand=reboot slots=1", "not a host name"),
        ("$(reboot) slots=1", "not a host name"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(line: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_hostfile(f"# first\nlocalhost slots=1\n{line}\n", "hosts")
    assert "hosts, line 3" in str(caught.value)
    assert says.split(" or ")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("first", "again"),
    [("node1", "NODE1"), ("node1", "node1."), ("fd00::1", "[fd00:0::1]"), ("10.0.0.1", "10.0.0.1")],
)
def test_a_host_stands_once(first: str, again: str) -> None:
    with pytest.raises(UserError, match=r"line 2: .*second time \(first in line 1\)"):
        parse_hostfile(f"{first} slots=1\n{again} slots=1\n", "hosts")


def test_lines_are_counted_as_editors_do() -> None:
    with pytest.raises(UserError, match="hosts, line 3"):
        parse_hostfile("# a form feed \f and a line separator \u2028\r\na slots=1\r\nb\r\n", "hosts")


def test_all_mistakes_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_hostfile("a slots=0\nb\nc slots=1\n", "hosts")
    assert "line 1" in str(caught.value)
    assert "line 2" in str(caught.value)


def test_an_empty_or_missing_hostfile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no node"):
        parse_hostfile("# nothing\n", "hosts")
    with pytest.raises(UserError, match="does not exist"):
        read_hostfile(tmp_path / "absent")
