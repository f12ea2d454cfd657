"""Runs of `aquila.pretrain` one after the other, each on ranks forked from one process that has imported
everything: a second each instead of ten. Used from a project's folder: `python forked_ranks.py JOBS.json`.

A job is {"ranks": 4, "args": [...]}. "memory": True prints what each rank held at most above the imports
while its model was built, and ends there; "step": what its second step took; "steps": what the first
two took. "limit": N lets each rank have N bytes of data above the imports. "kill": PATH kills all ranks
once PATH exists.
Prints for each job its statuses as a line `JOB [0, 0, 0, 0]`, after the ranks' own output.
"""

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback


def status(key: str) -> int:
    """Bytes, of this process, from /proc."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def imports() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from aquila.training.deepspeed.processes import quiet_libraries

    quiet_libraries()
    import deepspeed  # noqa: F401
    import torch._dynamo  # by torch.optim, at the first optimizer

    import aquila.pretrain  # noqa: F401


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def watch_memory(rank: int) -> None:
    """Prints the peak above what stood before the model was built, as a part of the whole model's size."""
    import torch.distributed as dist

    from aquila import pretrain

    build = pretrain.build_model

    def watched(*args, **options):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        before = status("VmRSS")
        model = build(*args, **options)
        whole = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
        print(f"PEAK {rank} {(status('VmHWM') - before) / whole:.4f} of {whole}", flush=True)
        dist.barrier()
        os._exit(0)

    pretrain.build_model = watched


def watch_step(rank: int, *, from_the_first: bool = False) -> None:
    """Prints what the second step held at most above what stood before it, as a part of the model's size.

    from_the_first: the first two steps, together: an allocator may keep what the first one took.
    """
    from aquila.training.deepspeed.engine import Engine

    step, calls, stood = Engine.train_step, [], []

    def watched(engine, *args, **options):
        if not (from_the_first and stood):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts anew
            stood.append(status("VmRSS"))
        before = stood[-1]
        result = step(engine, *args, **options)
        whole = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.model.parameters())
        calls.append((status("VmHWM") - before) / whole)
        if len(calls) == 2:
            print(f"STEP {rank} {calls[-1]:.4f}", flush=True)
        return result

    Engine.train_step = watched


def run_rank(job: dict, rank: int, port: int) -> int:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_RANK=str(rank), MASTER_ADDR="localhost",
        MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    from aquila import pretrain
    from aquila.core.errors import run_command

    if job.get("memory"):
        steps = job["memory"] in ("step", "steps")
        watch_step(rank, from_the_first=job["memory"] == "steps") if steps else watch_memory(rank)
    if job.get("limit"):
        most = status("VmData") + int(job["limit"])
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    sys.argv = ["aquila.pretrain", *job["args"]]
    try:
        run_command(pretrain.main)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(job: dict) -> list[int]:
    port, ranks = free_port(), []
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run_rank(job, rank, port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append(child)
    while job.get("kill") and not os.path.exists(job["kill"]):
        if os.waitid(os.P_PID, ranks[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break  # before its time
        time.sleep(0.01)
    for rank in ranks if job.get("kill") else ():
        os.kill(rank, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    imports()
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        print(f"START {' '.join(job['args'])}", flush=True)
        print(f"JOB {run(job)}", flush=True)
