"""Worker processes that end with their parent, however it ends."""

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from aquila.tokenizer import return_unused_memory

_PR_SET_PDEATHSIG = 1


class WorkerDiedError(RuntimeError):
    """A worker process ended without an answer; most often the system had no memory left for it."""


def run_tasks(
    work: Callable[[Any], Any], tasks: Iterable[Any], workers: int, *, ahead: int
) -> Iterator[tuple[Any, Any]]:
    """(task, result) in the order of `tasks`, computed by forked processes.

    At most `ahead` tasks are begun beyond the first one not yet given out, so that memory stays bounded
    when one task takes long. An exception of `work` is raised here. Raises `WorkerDiedError`.
    """
    context = multiprocessing.get_context("fork")
    _return_unused_memory()
    pool = [_start(context, work) for _ in range(workers)]
    try:
        yield from _ordered(pool, iter(tasks), ahead)
    finally:
        for process, connection in pool:
            connection.close()
            process.terminate()
        for process, _ in pool:
            process.join()


def _return_unused_memory() -> None:
    """What building the tokenizer used and freed would otherwise count again for every worker."""
    gc.collect()
    return_unused_memory()
    gc.freeze()


def _start(context: Any, work: Callable[[Any], Any]) -> tuple[Any, Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _ordered(
    pool: list[tuple[Any, Connection]], tasks: Iterator[Any], ahead: int
) -> Iterator[tuple[Any, Any]]:
    idle = [connection for _, connection in pool]
    busy: dict[Connection, int] = {}
    begun: dict[int, Any] = {}
    done: dict[int, Any] = {}
    next_task = next_out = 0
    exhausted = False
    while True:
        while idle and not exhausted and next_task < next_out + ahead:
            try:
                task = next(tasks)
            except StopIteration:
                exhausted = True
                break
            connection = idle.pop()
            begun[next_task] = task
            _send(connection, task)
            busy[connection] = next_task
            next_task += 1
        if next_out in done:
            yield begun.pop(next_out), _result(done.pop(next_out))
            next_out += 1
            continue
        if not busy:
            return
        ready = wait(list(busy))
        for connection in [c for c in busy if c in ready]:
            done[busy.pop(connection)] = _receive(connection)
            idle.append(connection)


def _send(connection: Connection, task: Any) -> None:
    try:
        connection.send(task)
    except OSError:
        raise WorkerDiedError("a worker process was killed; is the machine short of memory?") from None


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise WorkerDiedError("a worker process was killed; is the machine short of memory?") from None


def _result(answer: tuple[bool, Any]) -> Any:
    succeeded, value = answer
    if not succeeded:
        raise value
    return value


def _serve(connection: Connection, work: Callable[[Any], Any], parent: int) -> None:
    _die_with(parent)
    # Ctrl-C reaches every process of the terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, work(task))
        except Exception as error:
            answer = (False, error)
        connection.send(answer)


def _die_with(parent: int) -> None:
    """Asks the kernel to end this process with its parent: a fork's inherited pipes never report it."""
    if hasattr(signal, "SIGKILL") and os.uname().sysname == "Linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
