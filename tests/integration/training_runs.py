"""What the tests of training share: a project with a small model and corpus, and ranks started in it."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.integration.launch_helpers import command_of, copy_project, environment
from tests.integration.rank_server import ForkedProcess, RankServer

FAULT_RANK = Path(__file__).parent / "faults" / "fault_rank.py"
MODEL = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "vocab_size": 1217,
    "max_seq_len": 32, "checkpoint_activations": True, "ckpoint_layer": 1,
}  # fmt: skip
RUN = {
    "data_prefix": "data/demo_text_document", "split": "80,20", "batch_size": 2,
    "gradient_accumulation_steps": 2, "train_iters": 12, "lr": 1e-3, "log_interval": 1, "eval_interval": 4,
    "eval_iters": 2, "save_interval": 100, "tensorboard": False, "eval_at_start": False,
}  # fmt: skip
EXACT = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "consumed_samples",
    "consumed_tokens",
    "epoch",
    "valid_loss",
)


def make_project(folder: Path) -> Path:
    """A copy of the project with a small model folder, a small corpus and a run YAML."""
    project = copy_project(folder)
    model = project / "checkpoints_in" / "small"
    tiny = Path(__file__).parents[2] / "checkpoints_in" / "aquila-tiny"
    shutil.copytree(tiny, model)
    (model / "config.json").write_text(json.dumps(MODEL))
    (project / "run.yaml").write_text(yaml.safe_dump(RUN))
    add_corpus(project, "demo", 30)
    return project


def add_corpus(project: Path, name: str, documents: int) -> None:
    """`data/NAME_text_document`, of the demo corpus."""
    made = ("--output", f"{name}.jsonl", "--documents", str(documents))
    python(project, "-m", "data_tools.make_demo_corpus", *made)
    python(
        project, "-m", "data_tools.make_indexed_dataset", "--input", f"{name}.jsonl",
        "--output-prefix", f"data/{name}", "--model-dir", "checkpoints_in/small",
    )  # fmt: skip


def add_model(project: Path, name: str, config: dict) -> Path:
    """The small model's folder once more, with another `config.json`."""
    folder = project / "checkpoints_in" / name
    shutil.copytree(project / "checkpoints_in" / "small", folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_jobs(project: Path, jobs: list[dict], timeout: float = 300) -> tuple[list[list[int]], str]:
    """Jobs of `forked_ranks.py`: each one's statuses, and all that was printed."""
    printed = run_cases(project, Path(__file__).with_name("forked_ranks.py"), jobs, timeout)
    return [json.loads(line) for line in re.findall(r"^JOB (.*)$", printed, re.MULTILINE)], printed


def run_cases(project: Path, script: Path, cases: list[dict], timeout: float = 300) -> str:
    """All that a script of this folder prints that takes its cases as a JSON file."""
    (project / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, str(script), "cases.json"],
        cwd=project,
        env=environment(project) | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return done.stdout


def python(project: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        cwd=project,
        env=environment(project),
        check=True,
        capture_output=True,
        text=True,
    )


def start(
    project: Path,
    experiment: str,
    *overrides: str,
    ranks: int = 2,
    model: str = "small",
    fault: str = "",
) -> ForkedProcess:
    """Ranks of `aquila.pretrain` under torchrun; `fault` is one of faults/fault_rank.py."""
    variables = {**environment(project), "OMP_NUM_THREADS": "1"}
    key = (project, tuple(sorted(variables.items())))
    if key not in _servers:
        while _servers:  # those of projects that are done with
            _servers.popitem()[1].close()
        _servers[key] = RankServer(project, variables)
    # A file, not a pipe: nobody reads while the ranks run, and a full pipe would stop them.
    handle, output = tempfile.mkstemp(suffix=".log", dir=project)
    os.close(handle)
    return _servers[key].start(
        Path(output),
        ranks=ranks,
        program=str(FAULT_RANK) if fault else "aquila.pretrain",
        words=["run.yaml", model, experiment, *overrides],
        variables={"AQUILA_FAULT": fault},
    )


_servers: dict[tuple, RankServer] = {}


def finish(process: ForkedProcess, seconds: float = 300) -> str:
    """Waits for the end and returns all that was printed; ends ranks that take too long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise
    return process.output.read_text(encoding="utf-8", errors="replace")


def train(project: Path, experiment: str, *overrides: str, **options: Any) -> tuple[int, str]:
    """The status of torchrun and all that was printed; options as in `start`."""
    process = start(project, experiment, *overrides, **options)
    output = finish(process)
    return process.returncode, output


def metrics(project: Path, experiment: str) -> list[dict]:
    """The records so far; a reader may see the line that is just being written cut short."""
    path = project / "checkpoints_out" / experiment / "0" / "metrics.jsonl"
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def exact(records: list[dict]) -> list[dict]:
    return [{key: record.get(key) for key in EXACT} for record in records]


def weights_hash(project: Path, experiment: str, step: int) -> str:
    folder = project / "checkpoints_out" / experiment / "0" / "checkpoints" / f"step-{step:08d}"
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def wait_for(
    condition: Callable[[], object],
    process: ForkedProcess,
    *,
    seconds: float = 120,
    exits: bool = False,
    pause: float = 0.02,
) -> None:
    """Until `condition`; the process may end meanwhile only when `exits` says so."""
    end = time.monotonic() + seconds
    while not condition():
        assert exits or process.poll() is None, finish(process)
        assert time.monotonic() < end, "timed out"
        time.sleep(pause)


def children(pid: int) -> list[int]:
    """The ranks of a launch; none once it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [
            child.pid
            for child in psutil.Process(pid).children()
            if any("pretrain" in w or "fault_rank" in w for w in command_of(child))
        ]
    return []
