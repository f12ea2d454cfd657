"""What the launcher's tests share: a copy of the project to run in, stand-in ranks, a look for leftovers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from aquila.data.indexfile import bin_path, idx_path, write_index
from aquila.data.meta import make_meta, meta_path, tokenizer_facts, write_meta
from aquila.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests" / "integration" / "standin_rank.py"

_LAUNCH = """
import json, sys
from aquila.launch.launcher import launch
request = json.loads(sys.argv[1])
sys.exit(launch(request, wait=request.pop("wait")))
"""


def copy_project(folder: Path) -> Path:
    """A project of its own under `folder`: runs there touch nothing here."""
    project = folder / "project"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("aquila", "scripts", "configs", "data_tools"):
        shutil.copytree(ROOT / name, project / name, ignore=ignore)
    (project / "checkpoints_in").mkdir()
    return project


def add_tiny_model_and_data(project: Path) -> None:
    """A model folder `tiny`, a dataset for it and `configs/tiny.yaml`: four steps of the real thing."""
    model = project / "checkpoints_in" / "tiny"
    shutil.copytree(ROOT / "checkpoints_in" / "aquila-tiny", model, ignore=shutil.ignore_patterns("*.bin"))
    tokenizer = load_tokenizer(model)
    config = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 8, "max_seq_len": 32}
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": tokenizer.vocab_size}))
    prefix = project / "data" / "tiny_text_document"
    prefix.parent.mkdir()
    ids = np.random.default_rng(1).integers(1, 200, 20000).astype("<i4")
    bin_path(prefix).write_bytes(ids.tobytes())
    with idx_path(prefix).open("wb") as file:
        write_index(file, np.full(200, 100, np.int32))
    counts = {"documents": 200, "tokens": len(ids), "min_id": 1, "max_id": 199}
    write_meta(meta_path(prefix), make_meta(tokenizer_facts(tokenizer), counts, []))
    (project / "configs" / "tiny.yaml").write_text(
        "data_prefix: data/tiny_text_document\nbatch_size: 2\ntrain_iters: 4\nlr: 1.0e-3\nlog_interval: 1\n"
        "eval_interval: 0\nprecision: fp32\ntensorboard: False\nsave_interval: 1000\n"
    )


def environment(project: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
    return {**kept, "PYTHONPATH": str(project), "AQUILA_PYTHON": sys.executable}


def standin_request(experiment: str = "exp", **changes: Any) -> dict[str, Any]:
    """A launch of stand-in ranks on this machine: see `controller.Controller`."""
    steps, seconds = changes.pop("steps", 5), changes.pop("seconds", 0.1)
    request = {
        "nodes": [{"host": "localhost", "slots": 2, "here": True}],
        "experiment": experiment,
        "resume": "auto",
        "command": [sys.executable, str(STANDIN)],
        "arguments": [str(steps), str(seconds), experiment, *changes.pop("overrides", [])],
        "environment": {},
        "settings": "",
        "node_timeout": 60.0,
        "rejoin_timeout": 30.0,
        "max_restarts": 0,
        "min_nodes": None,
        "stop_command": "",
        "wait": True,
    }
    return {**request, **changes}


def start_launch(project: Path, request: dict[str, Any]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, json.dumps(request)],
        cwd=project, env=environment(project), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def launch(project: Path, request: dict[str, Any], timeout: float = 60) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one launch."""
    process = start_launch(project, request)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def processes_of(project: Path) -> list[psutil.Process]:
    """Every process that works in the project's copy or names it: what must not be left."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            place = process.cwd()
            ended = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        mine = process.pid == os.getpid()
        if not mine and not ended and str(project) in (words + " " + place):
            found.append(process)
    return found


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing for one that has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def assert_nothing_left(project: Path, within: float = 15) -> None:
    deadline = time.monotonic() + within
    while (left := processes_of(project)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, [(process.pid, command_of(process)) for process in left]


def wait_for(condition, timeout: float = 30, every: float = 0.1) -> Any:
    """The condition's first true value. Raises `TimeoutError`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every)
    raise TimeoutError(f"not within {timeout} s")


def interrupt(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)


def versions(project: Path, experiment: str = "exp") -> list[Path]:
    return sorted((project / "checkpoints_out" / experiment).glob("2*"))


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []
