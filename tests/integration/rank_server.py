"""torchrun and its ranks, forked from one process that has imported everything: a start takes a second
instead of ten. What runs is the real launcher and the real program; only their imports are shared.

As a script, from a project's folder: reads requests, one JSON object a line, and ends with its input. A
request is {"ranks", "program" (a module's name, or a script's path), "words", "variables" (environment),
"output" (where all is printed)}; the answer is a line `PID`, and later the exit status in the file
OUTPUT.status.
"""

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tests.integration import forked_ranks

_STANDARD = (0, 1, 2)


class RankServer:
    """The process that imports once, as seen from a test."""

    def __init__(self, project: Path, variables: dict[str, str]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([str(project), root])
        # "pretrain" among the words tells its ranks from other processes.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.rank_server", "aquila.pretrain"],
            cwd=project,
            env={**variables, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, output: Path, **request: Any) -> "ForkedProcess":
        """Starts torchrun. Raises `RuntimeError` when the server has ended."""
        try:
            print(json.dumps({**request, "output": str(output)}), file=self.process.stdin, flush=True)
            pid = int(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise RuntimeError("the server of ranks has ended; its error is above") from None
        return ForkedProcess(self, pid, output)

    def close(self) -> None:
        """Ends the server and, by its own end, nothing else."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class ForkedProcess:
    """What a test uses of `subprocess.Popen`, for a process that the server started."""

    def __init__(self, server: RankServer, pid: int, output: Path) -> None:
        self.server, self.pid, self.output = server, pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(OSError, ValueError):
                self.returncode = int(Path(f"{self.output}.status").read_text())
        if self.returncode is None and self.server.process.poll() is not None:
            self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit status. Raises `subprocess.TimeoutExpired`."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("torchrun", timeout)
            time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class _ForkedRank:
    """What torchrun uses of `subprocess.Popen`, for a rank forked from torchrun itself."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], kept: set[int]) -> None:
        self.args, self.returncode, self.pid = args, None, 0
        # From a thread of its own, the main thread of the rank: its stack does not begin in torchrun.
        thread = threading.Thread(target=self._fork, args=(args, env, kept))
        thread.start()
        thread.join()

    def _fork(self, args: tuple[str, ...], env: dict[str, str], kept: set[int]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _leave_nothing_open(kept)
            os.environ.clear()
            os.environ.update(env)
            _run(lambda: _program(args))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode


def _open_files() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}


def _leave_nothing_open(kept: set[int]) -> None:
    for number in _open_files() - kept:
        with contextlib.suppress(OSError):
            os.close(number)


def _run(main: Any) -> None:
    """Ends this process as Python would end one that ran `main`, but for the destructors of its parent's
    objects."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        main()
    except SystemExit as ended:
        if ended.code is not None:
            status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _program(words: tuple[str, ...]) -> None:
    name, *rest = words
    sys.argv = [name, *rest]
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def _torchrun(request: dict[str, Any], kept: set[int]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda handler, args, env: _ForkedRank(args, env, kept)
    run.main([
        "--nproc-per-node", str(request["ranks"]), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "--no-python", request["program"], *request["words"],
    ])  # fmt: skip


def _fork(request: dict[str, Any], kept: set[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    quiet = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, number in zip((quiet, printed, printed), _STANDARD, strict=True):
        os.dup2(source, number)
    os.close(quiet)
    os.close(printed)
    os.environ.update(request["variables"])
    _run(lambda: _torchrun(request, kept))
    raise AssertionError("never reached")


def _serve() -> None:
    forked_ranks.imports()
    import torch.distributed.run  # noqa: F401

    kept, outputs = _open_files(), {}
    while True:
        while outputs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            place = outputs.pop(pid)
            whole = Path(f"{place}.status.new")
            whole.write_text(str(os.waitstatus_to_exitcode(status)))
            whole.rename(f"{place}.status")
        if not select.select([0], [], [], 0.02 if outputs else None)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        pid = _fork(request, kept)
        outputs[pid] = request["output"]
        print(pid, flush=True)


if __name__ == "__main__":
    _serve()
