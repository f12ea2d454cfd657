"""Protects: what the driver's network tool says becomes an error before a rank waits for its peer."""

import socket
from pathlib import Path

import pytest

from aquila.launch import fabric

TOOL = """#!/bin/sh
case "$3" in
    -link) [ "$2" = 1 ] && echo "link status: DOWN" || echo "link status: UP";;
    -net_health) echo "net health status: Success";;
    -tls) echo "dev_id:$2, tls switch[0](0:disable, 1:enable), tls preconfigured[1](0:non-preset, 1:preset)";;
esac
"""
WELL = {"link": ["UP", "UP"], "health": ["Success", None], "tls": ["0", "0"], "busy": []}


def test_the_tool_is_asked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fabric.find_tool() is None
    (tmp_path / "hccn_tool").write_text(TOOL)
    (tmp_path / "hccn_tool").chmod(0o755)
    monkeypatch.setattr(fabric, "HOST_PORTS", range(0))
    found = fabric.probe_fabric(2)
    assert found == {"link": ["UP", "DOWN"], "health": ["Success"] * 2, "tls": ["0", "0"], "busy": []}


def test_a_machine_without_the_tool_is_not_asked(monkeypatch) -> None:
    monkeypatch.setattr(fabric, "find_tool", lambda: None)
    assert fabric.probe_fabric(8) is None


def test_a_tool_that_says_nothing_is_no_fault(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hccn_tool").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "hccn_tool").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = fabric.probe_fabric(1)
    assert fabric.fabric_problems({"a": {**found, "busy": []}, "b": WELL}, 2) == ([], [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"link": ["UP", "DOWN"]}, "b: the network link of device(s) 1 is down"),
        ({"tls": ["1", "1"]}, "TLS between devices is on at b and off elsewhere"),
    ],
)
def test_what_keeps_nodes_apart(change: dict, said: str) -> None:
    found = {"a": WELL, "b": {**WELL, **change}}
    errors, warnings = fabric.fabric_problems(found, 2)
    assert said in errors[0]
    assert warnings == []
    alone = fabric.fabric_problems({"b": {**WELL, "link": ["UP", "DOWN"]}}, 1)
    assert alone[0] == []  # one machine's devices have links of their own
    assert "is down" in alone[1][0]


def test_warnings() -> None:
    found = {"a": {**WELL, "health": ["Receive packet error", "Success"], "busy": [60000, 60001]}}
    errors, warnings = fabric.fabric_problems(found, 2)
    assert errors == []
    assert "network health of device 0: Receive packet error" in warnings[0]
    assert "port(s) 60000, 60001" in warnings[1]


def test_a_taken_port_is_seen() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert fabric._taken(port)
    assert not fabric._taken(port)
