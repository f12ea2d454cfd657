"""Protects: this machine is found in the hostfile by address, by name and as localhost."""

import os
import socket
import subprocess
import sys

import pytest

from aquila.core.errors import UserError
from aquila.launch import nodes
from aquila.launch.hostfile import Node, parse_hostfile


def own_address() -> str | None:
    found = [a for a in nodes.local_interfaces() if not a.startswith(("127.", "::1", "fe80"))]
    return found[0] if found else None


def test_this_node_by_localhost_name_and_address() -> None:
    assert nodes.is_this_node("localhost")
    assert nodes.is_this_node("127.0.0.1")
    assert nodes.is_this_node("::1")
    assert nodes.is_this_node(socket.gethostname())
    assert nodes.is_this_node(socket.gethostname().upper())
    if address := own_address():
        assert nodes.is_this_node(address)
    assert not nodes.is_this_node("192.0.2.200")
    assert not nodes.is_this_node("no-such-host.invalid")


def test_the_line_of_this_node_is_found_among_others() -> None:
    listed = parse_hostfile("192.0.2.200 slots=8\nlocalhost slots=2\n", "hosts")
    assert nodes.find_this_node(listed, "hosts") == Node("localhost", 2, 2)


def test_not_in_the_hostfile_names_this_node_and_its_addresses() -> None:
    listed = parse_hostfile("192.0.2.200 slots=8\n", "hosts")
    with pytest.raises(UserError, match=socket.gethostname()):
        nodes.find_this_node(listed, "hosts")


def test_two_lines_for_this_node_are_refused() -> None:
    listed = parse_hostfile("localhost slots=1\n127.0.0.1 slots=1\n", "hosts")
    with pytest.raises(UserError, match=r"localhost \(line 1\) and 127.0.0.1 \(line 2\)"):
        nodes.find_this_node(listed, "hosts")


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", nodes.free_port("127.0.0.1")))


def test_interfaces_are_set_only_where_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in nodes.INTERFACE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nodes, "local_interfaces", lambda: {"10.0.0.1": "eth7", "127.0.0.1": "lo"})
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    chosen = nodes.interface_settings("10.0.0.1", single_node=False)
    assert chosen == {
        "GLOO_SOCKET_IFNAME": "eth7",
        "TP_SOCKET_IFNAME": "eth7",
        "HCCL_SOCKET_IFNAME": "=eth7",
    }
    assert nodes.interface_settings("10.0.0.1", single_node=True) == {"GLOO_SOCKET_IFNAME": "lo"}


def test_what_is_forwarded_is_training_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    forwarded = nodes.forwarded_environment()
    assert forwarded["NCCL_DEBUG"] == "INFO"
    assert "SECRET_TOKEN" not in forwarded
    assert "PATH" not in forwarded or os.environ["PATH"] == ""


def test_words_that_are_missing_are_named_and_no_others() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aquila.launch", "dist", "hostfile"], text=True, capture_output=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("required: config, model, experiment")
