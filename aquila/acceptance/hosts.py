"""The other hosts of a hostfile: each accepted by itself, then all of them training as one."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from aquila.acceptance.ranks import environment
from aquila.acceptance.table import FAIL, Measured, Skip, Table
from aquila.acceptance.training import MODEL, RUN, Runs, loss_difference, read_records
from aquila.core.paths import ROOT
from aquila.launch.channel import on_host
from aquila.launch.hostfile import Node, read_hostfile
from aquila.launch.nodes import is_this_node
from aquila.launch.toolkit import HOME, find_set_env

TIMEOUT = 900
_QUICK = ["-m", "aquila.accept", "--quick", "--json", "-"]


def check_hosts(table: Table, hostfile: Path) -> None:
    """A line for each other host, and one for a run over all of them against one rank here.

    The project must lie in the same place on every host, on a disk that they share.
    """
    nodes = read_hostfile(hostfile)
    for node in nodes:
        if not is_this_node(node.host):
            table.check("hosts", f"{node.host} by itself", lambda node=node: _quick(node))
    total = sum(node.slots for node in nodes)
    with _shared_folder() as folder:
        table.check(
            "hosts", f"{total} ranks on {len(nodes)} host(s), fp32 = 1 rank here",
            lambda: _together(hostfile, folder, total), needs=("hosts",),
        )  # fmt: skip


def _quick(node: Node) -> Measured:
    """The quick acceptance there, over the line that a run would use; CANN's set_env.sh sourced."""
    words = ["env", "OMP_NUM_THREADS=2", sys.executable, *_QUICK]
    if HOME in environment() and (script := find_set_env()):
        words = ["bash", "-c", 'source "$0" >/dev/null 2>&1; exec "$@"', str(script), *words]
    done = subprocess.run(
        on_host(node.host, words), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
    )
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("{")), None)
    if last is None:
        raise RuntimeError(done.stderr.strip()[-300:] or f"exit status {done.returncode}, no answer")
    results = json.loads(last)["results"]
    failed = [f"{r['stage']}: {r['name']}" for r in results if r["state"] == FAIL]
    return Measured(len(failed), 0, "failed", detail="; ".join(failed) or f"{len(results)} checks")


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """A folder in the project, for a disk that the hosts share, gone afterwards."""
    folder = ROOT / "checkpoints_out" / f".accept-{time.time_ns():x}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _together(hostfile: Path, folder: Path, ranks: int) -> Measured:
    runs = Runs(folder, 1)
    runs.prepare()
    samples = max(4, ranks)
    if samples % ranks:
        raise Skip(f"{ranks} ranks do not divide {samples} samples a step")
    one = runs.run("one", 1, "precision=fp32", f"batch_size={samples}")
    run = {**RUN, "data_prefix": str(folder / RUN["data_prefix"]), "batch_size": samples // ranks}
    (folder / "hosts.yaml").write_text(yaml.safe_dump({**run, "precision": "fp32"}))
    experiment = folder.name.lstrip(".") + "-hosts"
    command = [
        "bash", "scripts/dist_trigger_docker.sh", str(hostfile.resolve()), str(folder / "hosts.yaml"),
        str(folder / "checkpoints_in" / "small"), experiment, "--wait",
    ]  # fmt: skip
    out = ROOT / "checkpoints_out" / experiment
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**environment(), "AQUILA_PYTHON": sys.executable},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(
                f"exit status {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}"
            )
        many = read_records(next(iter(sorted(out.glob("*/metrics.jsonl")))))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Measured(loss_difference(one, many), 1e-5, detail=f"dim {MODEL['dim']}, {len(one)} steps")
