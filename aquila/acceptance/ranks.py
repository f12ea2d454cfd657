"""Ranks of this machine under torchrun, as the launcher starts them."""

import os
import subprocess
import sys
from pathlib import Path

from aquila.core.paths import ROOT


def environment() -> dict[str, str]:
    """For a process that is to find the project from any folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}


def start_ranks(ranks: int, words: list[str], folder: Path, log: Path) -> subprocess.Popen:
    """`python WORDS...` as `ranks` processes in `folder`, in a session of their own, output in `log`."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words,
    ]  # fmt: skip
    with log.open("a") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=output, stderr=output, start_new_session=True
        )
