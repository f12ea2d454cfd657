"""Protects: CANN's environment is found on every node, over ssh too, and the vendor's pairs are one table."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from aquila.launch import channel, toolkit


@pytest.fixture
def cann(tmp_path: Path, monkeypatch) -> Path:
    """A CANN's folder with its set_env.sh, named by the user."""
    home = tmp_path / "a cann"
    (home / "aarch64-linux").mkdir(parents=True)
    info = home / "aarch64-linux" / "ascend_toolkit_install.info"
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001C23\n")
    (home / "set_env.sh").write_text(
        f"export ASCEND_HOME_PATH='{home}' PYTHONPATH=/cann/python:$PYTHONPATH\n"
        "export LD_LIBRARY_PATH=/cann/lib:$LD_LIBRARY_PATH\necho wait_for_hello\nfalse\n"
    )
    for name in (toolkit.HOME, "PYTHONPATH", "LD_LIBRARY_PATH", "HCCL_BUFFSIZE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv(toolkit.SET_ENV, str(home / "set_env.sh"))
    return home


def test_the_environment_is_completed(cann: Path, monkeypatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    toolkit.set_up({"HCCL_BUFFSIZE": "200", "LD_LIBRARY_PATH": "/the/head's"})
    assert os.environ[toolkit.HOME] == str(cann)
    assert os.environ["LD_LIBRARY_PATH"].startswith("/cann/lib:/mine")
    assert os.environ["PYTHONPATH"] == "/cann/python:"
    assert os.environ["HCCL_BUFFSIZE"] == "200"
    assert toolkit.cann_version() == "8.3.RC1"


def test_what_is_set_up_stays(cann: Path, monkeypatch) -> None:
    monkeypatch.setenv(toolkit.HOME, "/my/own")
    toolkit.set_up()
    assert os.environ[toolkit.HOME] == "/my/own"
    assert "PYTHONPATH" not in os.environ


def test_a_node_over_ssh_has_its_own_cann(cann: Path) -> None:
    """The agent as sshd starts it: no profile is read; the head node says where set_env.sh is."""
    shell = channel.remote_shell([sys.executable, "-m", "aquila.launch.agent"])
    path = shlex.quote(os.environ["PATH"])
    agent = subprocess.Popen(
        ["env", "-i", "SSH_CLIENT=1.2.3.4 5 6", f"PATH={path}", "bash", "-c", shell],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    environment = {toolkit.SET_ENV: os.environ[toolkit.SET_ENV]}
    request = {"op": "probe", "paths": [], "output": "/tmp", "devices": True, "slots": 1}
    try:
        agent.stdin.write(json.dumps({**request, "environment": environment}) + "\n")
        agent.stdin.flush()
        answer = next(e for e in map(json.loads, agent.stdout) if e["event"] == "probed")
        agent.stdin.write(json.dumps({"op": "end"}) + "\n")
        agent.stdin.close()
        assert agent.wait(10) == 0
    finally:
        agent.kill()
    assert answer["devices"]["versions"]["CANN"] == "8.3.RC1"
    assert answer["devices"]["toolkit"]


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("ascend_toolkit_install.info", "package=x\nversion=8.5.0\n", "8.5.0"),
        ("version.cfg", "# version: 1.0\ntoolkit_running_version=[7.6.0.1.220:8.2.RC1]\n", "8.2.RC1"),
        ("version.info", "Version=9.1.0\n", "9.1.0"),
        ("other", "version=1.0\n", None),
    ],
)
def test_the_version_of_cann(tmp_path: Path, root: Path, name: str, text: str, version: str | None) -> None:
    (tmp_path / name).write_text(text)
    assert toolkit.cann_version(str(tmp_path)) == version
    if name == "version.info":
        return  # the installer asks the other two
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "source scripts/common.sh; cann_version"],
        cwd=root, env={**os.environ, toolkit.HOME: str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == (version or "")


def test_pairs_that_do_not_fit_are_named() -> None:
    problem = toolkit.pair_problem("2.9.0", "8.3.RC1")
    assert "torch_npu 2.9.0 is made for CANN 8.5.0, and here is CANN 8.3.RC1" in problem
    assert "torch 2.8.0 with torch_npu 2.8.0" in problem
    for fine in (("2.9.0", "8.5.0"), ("2.9.0", "9.0.0"), ("2.13.0", "8.1.RC1"), ("2.9.0", None)):
        assert toolkit.pair_problem(*fine) is None


def test_the_documentation_has_the_table_that_is_used(root: Path) -> None:
    text = (root / "docs" / "npu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    rows = [row for row in rows if row[0][0].isdigit()]
    assert [toolkit.Pair(*row) for row in rows] == toolkit.pairs()


@pytest.mark.parametrize(
    ("torch", "torch_npu", "cann", "wanted"),
    [
        ("2.7.1", "", "8.3.RC1", "torch_npu==2.7.1"),
        ("2.7.1", "", "9.1.0", "torch_npu==2.7.1.post8"),
        ("2.13.0", "", "", "torch_npu==2.13.0"),
        ("2.9.1", "2.9.1+gitabc", "8.5.0", ""),
        ("2.9.1", "", "8.5.0", None),
    ],
)
def test_the_installer_keeps_or_chooses(
    tmp_path: Path, root: Path, torch: str, torch_npu: str, cann: str, wanted: str | None
) -> None:
    """A torch_npu that is there stays; else the one of the vendor's pair with torch and CANN."""
    for name, version in (("torch", torch), ("torch_npu", torch_npu)):
        if version:
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "ascend_toolkit_install.info").write_text(f"version={cann}\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source scripts/common.sh; torch_npu_for {python}"],
        cwd=root, env={**os.environ, toolkit.HOME: str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == ((0, wanted) if wanted is not None else (2, ""))
    assert ("no torch_npu for torch 2.9.1" in done.stderr) == (wanted is None)
