"""The NPUs' own network on this machine, by the driver's `hccn_tool`, and the ports that HCCL takes."""

import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TOOL = "/usr/local/Ascend/driver/tools/hccn_tool"
HOST_PORTS = range(60000, 60016)
"""What HCCL binds on the host where no HCCL_HOST_SOCKET_PORT_RANGE is set, or known to this CANN."""
_TIMEOUT = 15
_QUESTIONS = {
    "link": (("-link", "-g"), re.compile(r"link status:\s*(\S+)")),
    "health": (("-net_health", "-g"), re.compile(r"net health status:\s*(.+)")),
    "tls": (("-tls", "-g"), re.compile(r"tls switch\[(\d)\]")),
}


def find_tool() -> str | None:
    """The driver's tool for its network, None on a machine without one."""
    return shutil.which("hccn_tool") or (TOOL if Path(TOOL).is_file() else None)


def probe_fabric(devices: int) -> dict[str, Any] | None:
    """Keys link, health, tls: each device's answer, or None for one that gave none; busy: ports taken.

    None on a machine without the driver's tool. Asks only; changes nothing.
    """
    tool = find_tool()
    if tool is None:
        return None

    def ask(question: tuple[str, int]) -> str | None:
        words, pattern = _QUESTIONS[question[0]]
        try:
            done = subprocess.run(
                [tool, "-i", str(question[1]), *words],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, errors="replace",
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = pattern.search(done.stdout)
        return found[1].strip() if found else None

    questions = [(name, device) for name in _QUESTIONS for device in range(devices)]
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(questions, pool.map(ask, questions), strict=True))
    found = {name: [answers[name, device] for device in range(devices)] for name in _QUESTIONS}
    return {**found, "busy": [port for port in HOST_PORTS if _taken(port)]}


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that only lingers is free
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def fabric_problems(found: dict[str, dict[str, Any]], nodes: int) -> tuple[list[str], list[str]]:
    """Errors and warnings in the answers of `probe_fabric` by host. Links matter between nodes alone."""
    errors, warnings = [], []
    for host, answer in found.items():
        down = [str(i) for i, state in enumerate(answer["link"]) if state not in (None, "UP")]
        if down:
            errors.append(
                f"{host}: the network link of device(s) {', '.join(down)} is down (hccn_tool -i N -link -g); "
                "see to cable, optical module and switch"
            )
        ill = [f"{i}: {s}" for i, s in enumerate(answer["health"]) if s not in (None, "Success", "Init")]
        if ill and not down:
            warnings.append(
                f"{host}: network health of device {'; '.join(ill)} (hccn_tool -i N -net_health -g)"
            )
        if answer["busy"]:
            warnings.append(
                f"{host}: port(s) {', '.join(map(str, answer['busy'][:4]))} that HCCL takes by default are "
                "taken, by an earlier or another run; older CANN releases ignore "
                "HCCL_HOST_SOCKET_PORT_RANGE=auto: end that run, or set HCCL_IF_BASE_PORT"
            )
    switches = {state for answer in found.values() for state in answer["tls"] if state is not None}
    if len(switches) > 1:
        on = [host for host, answer in found.items() if "1" in answer["tls"]]
        errors.append(
            f"TLS between devices is on at {', '.join(on)} and off elsewhere, so that they cannot connect; "
            "make it one on every device (hccn_tool -i N -tls -s enable 0, or 1)"
        )
    if nodes == 1:
        return [], errors + warnings
    return errors, warnings
