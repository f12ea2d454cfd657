"""Stopping a run: its ranks save a checkpoint and leave; nothing stays behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aquila.core import run_folder
from aquila.core.errors import EXIT_FAILURE, UserError
from aquila.core.paths import ROOT
from aquila.launch.agent import agent_alive, machine_key
from aquila.launch.channel import on_host
from aquila.launch.hostfile import read_hostfile
from aquila.launch.nodes import is_this_node
from aquila.launch.torchrun import kill_marked

STOP_TIMEOUT = 600.0
"""Seconds for saving the last checkpoint, after which the ranks are killed."""


def running_agents(experiment: str, root: Path = ROOT) -> list[dict[str, Any]]:
    """The states of the agents of an experiment that are alive on this machine."""
    found = []
    for path in run_folder.experiment_dir(root, experiment).glob("*/launch/node-*.json"):
        state = run_folder.read_json(path)
        if state and state.get("machine") == machine_key() and agent_alive(state):
            found.append(state)
    return found


def stop_here(experiment: str) -> int:
    """Stops this machine's ranks of an experiment and waits until they are gone. 0 when nothing is left."""
    if not run_folder.experiment_dir(ROOT, experiment).is_dir():
        raise UserError(f"no experiment '{experiment}' under {ROOT / 'checkpoints_out'}")
    agents = running_agents(experiment)
    if not agents:
        print(f"{experiment} is not running on this node")
        return 0
    for state in agents:
        print(f"{experiment}/{state['version']}: saving a checkpoint, then stopping", flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(state["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT
    while (left := [state for state in agents if agent_alive(state)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for state in left:
        print(f"still saving after {STOP_TIMEOUT:.0f} s: killed", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.kill(state["pid"], signal.SIGKILL)
        kill_marked(state.get("mark", ""))
    print(f"{experiment} has stopped on this node")
    return EXIT_FAILURE if left else 0


def stop_nodes(hostfile: Path, experiment: str) -> int:
    """`stop_here` on every node of the hostfile at once; every failure is shown."""
    nodes = read_hostfile(hostfile)
    with ThreadPoolExecutor(len(nodes)) as pool:
        results = list(pool.map(lambda node: _stop_on(node.host, experiment), nodes))
    for node, (status, output) in zip(nodes, results, strict=True):
        for line in output.strip().splitlines() or [f"exit status {status}"]:
            print(f"{node.host}: {line}", file=sys.stderr if status else sys.stdout)
    return EXIT_FAILURE if any(status for status, _ in results) else 0


def _stop_on(host: str, experiment: str) -> tuple[int, str]:
    words = [sys.executable, "-m", "aquila.launch", "stop", experiment]
    command = words if is_this_node(host) else on_host(host, words)
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=STOP_TIMEOUT + 30,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return EXIT_FAILURE, "no answer"
    return done.returncode, done.stdout
