"""The line from the controller to the agent of one node: a child process here, ssh elsewhere.

What an agent is asked travels as JSON over its standard input. The only words a remote shell sees are
this project's folder and the Python that runs it, each quoted.
"""

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

from aquila.core.errors import UserError
from aquila.core.jsonl import objects
from aquila.core.paths import ROOT
from aquila.launch.rank_wrapper import die_with_parent

SSH_OPTIONS = (
    "-T",
    "-oBatchMode=yes",  # a question for a password or a new host key cannot be answered here
    "-oConnectTimeout=6",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=6",
)

SRUN_OPTIONS = ("--nodes=1", "--ntasks=1", "--overlap", "--quiet", "--export=ALL")


def remote_shell(words: list[str]) -> str:
    """One command line for the remote login shell, whichever it is, that runs `words` in this folder.

    Everything is quoted for `sh`, and the whole once more as the single argument of `sh -c`.
    """
    script = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(words)}"
    return f"exec sh -c {shlex.quote(script)}"


def on_host(host: str, words: list[str]) -> list[str]:
    """The command that runs `words` on another node: over ssh, or as AQUILA_TRANSPORT says with srun."""
    transport = os.environ.get("AQUILA_TRANSPORT", "ssh")
    if transport == "ssh":
        return ["ssh", *SSH_OPTIONS, "--", host, remote_shell(words)]
    if transport == "srun":
        return ["srun", *SRUN_OPTIONS, f"--nodelist={host}", f"--chdir={ROOT}", *words]
    raise UserError(f"AQUILA_TRANSPORT is '{transport}'; there are: ssh, srun")


def agent_command(host: str, here: bool) -> list[str]:
    words = [sys.executable, "-m", "aquila.launch.agent"]
    return words if here else on_host(host, words)


class Channel:
    """One agent. Its events arrive in `events` as (node index, event); the line's end as "closed"."""

    def __init__(self, index: int, host: str, here: bool, events: "queue.Queue[tuple[int, dict]]") -> None:
        self.index, self.host, self.here = index, host, here
        self.events = events
        self.errors: deque[str] = deque(maxlen=20)
        self.last_heard = time.monotonic()
        self.open = True
        self.process = subprocess.Popen(
            agent_command(host, here),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": _python_path()} if here else None,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._stdin: Any = self.process.stdin
        self._stdout: Any = self.process.stdout
        self._stderr: Any = self.process.stderr
        self.outgoing: queue.Queue[bytes | None] = queue.Queue()
        self.threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._read, self._write, self._complain)
        ]
        for thread in self.threads:
            thread.start()

    def send(self, operation: str, **fields: Any) -> None:
        """Never waits: a node whose line is stuck must not hold up the others."""
        self.outgoing.put(json.dumps({"op": operation, **fields}).encode() + b"\n")

    def end(self) -> None:
        """Tells the agent that nothing more comes; it leaves when it has done what was asked."""
        self.open = False
        self.outgoing.put(None)

    def close(self, timeout: float = 1.0) -> None:
        """Ends the line, and the process that holds it."""
        self.end()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)

    def last_errors(self) -> str:
        """What ssh or the agent wrote to standard error, in one line."""
        self.threads[2].join(0.5)
        return " ".join(line.strip() for line in self.errors if line.strip())

    def _read(self) -> None:
        for line in self._stdout:
            self.last_heard = time.monotonic()
            event = objects(line)
            if event and "event" in event[0]:
                self.events.put((self.index, {**event[0], "channel": id(self)}))
            else:  # a login shell that greets
                self.errors.append(line.decode("utf-8", errors="replace"))
        self.events.put((self.index, {"event": "closed", "channel": id(self)}))

    def _write(self) -> None:
        while (data := self.outgoing.get()) is not None:
            try:
                self._stdin.write(data)
                self._stdin.flush()
            except OSError:
                return
        try:
            self._stdin.close()
        except OSError:
            return

    def _complain(self) -> None:
        for line in self._stderr:
            self.errors.append(line.decode("utf-8", errors="replace"))


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
