"""Real runs of `aquila.pretrain` on this machine's devices: ranks, ZeRO, saving, killing, resuming."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from aquila.acceptance.ranks import environment, start_ranks
from aquila.acceptance.table import Measured, Skip, Table
from aquila.core.jsonl import objects
from aquila.core.paths import ROOT

STEPS, SAVED = 8, 4
MODEL = {
    "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "vocab_size": 1217,
    "max_seq_len": 128,
}  # fmt: skip
RUN = {
    "data_prefix": "data/demo_text_document", "split": "90,10", "train_iters": STEPS, "lr": 1e-3,
    "warm_up_iters": 2, "log_interval": 1, "eval_interval": STEPS, "eval_iters": 1, "eval_at_start": False,
    "save_interval": SAVED,
    "tensorboard": False, "batch_size": 2,
}  # fmt: skip
TIMEOUT = 300
"""Seconds for one run; a first one may compile."""


class Runs:
    """A folder with a small model and corpus, and runs in it."""

    def __init__(self, folder: Path, devices: int) -> None:
        self.folder, self.devices = folder, devices
        self.ready = False

    def prepare(self) -> Measured:
        """Makes corpus, model folder and run YAML."""
        tiny = ROOT / "checkpoints_in" / "aquila-tiny"
        model = self.folder / "checkpoints_in" / "small"
        model.mkdir(parents=True)
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            (model / name).write_bytes((tiny / name).read_bytes())
        (model / "config.json").write_text(json.dumps(MODEL))
        (self.folder / "run.yaml").write_text(yaml.safe_dump(RUN))
        started = time.perf_counter()
        self._python("-m", "data_tools.make_demo_corpus", "--output", "demo.jsonl", "--documents", "400")
        self._python(
            "-m", "data_tools.make_indexed_dataset", "--input", "demo.jsonl", "--output-prefix", "data/demo",
            "--model-dir", str(model),
        )  # fmt: skip
        self.ready = True
        return Measured(time.perf_counter() - started, unit="s")

    def _python(self, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-500:])

    def start(self, experiment: str, ranks: int, *overrides: str) -> subprocess.Popen:
        """Ranks under torchrun, their output in EXPERIMENT.log."""
        words = [
            "-m",
            "aquila.pretrain",
            "run.yaml",
            str(self.folder / "checkpoints_in" / "small"),
            experiment,
        ]
        return start_ranks(ranks, [*words, *overrides], self.folder, self.folder / f"{experiment}.log")

    def run(self, experiment: str, ranks: int, *overrides: str) -> list[dict]:
        """A whole run; its records. Raises `RuntimeError` with the end of its log when it fails."""
        if not self.ready:
            raise Skip("the demo corpus could not be made")
        if ranks > self.devices:
            raise Skip(f"{self.devices} device(s) here")
        process = self.start(experiment, ranks, *overrides)
        try:
            status = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"not done after {TIMEOUT} s: {self._error(experiment)}") from None
        if status:
            raise RuntimeError(f"exit status {status}: {self._error(experiment)}")
        return self.records(experiment)

    def _error(self, experiment: str) -> str:
        lines = (self.folder / f"{experiment}.log").read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line or line.startswith("error")]
        return (errors or lines or ["no output"])[0]

    def records(self, experiment: str) -> list[dict]:
        """What `metrics.jsonl` holds so far, whole lines alone."""
        return read_records(self.folder / "checkpoints_out" / experiment / "0" / "metrics.jsonl")

    def killed(self, experiment: str, ranks: int, *overrides: str) -> list[dict]:
        """A run that is killed (SIGKILL to every rank) after its first save, and started again."""
        if ranks > self.devices:
            raise Skip(f"{self.devices} device(s) here")
        process = self.start(experiment, ranks, *overrides)
        checkpoints = self.folder / "checkpoints_out" / experiment / "0" / "checkpoints"
        deadline = time.monotonic() + TIMEOUT
        while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return self.run(experiment, ranks, *overrides)


def read_records(path: Path) -> list[dict]:
    """The steps of a `metrics.jsonl`, whole lines alone; none where there is no file yet."""
    found = objects(path.read_bytes()) if path.is_file() else []
    return [record for record in found if record.get("loss") is not None]


def loss_difference(one: list[dict], other: list[dict]) -> float:
    """Greatest relative difference of the losses of two runs, step by step."""
    losses = [
        {r["step"]: r["loss"] for r in records if r.get("loss") is not None} for records in (one, other)
    ]
    if not losses[0] or losses[0].keys() != losses[1].keys():
        raise RuntimeError(f"steps logged: {sorted(losses[0])} and {sorted(losses[1])}")
    return max(abs(a - losses[1][step]) / abs(a) for step, a in losses[0].items())


def check_training(table: Table, devices: int, precision: str, overlaps: bool = False) -> None:
    """ZeRO stages, ranks, save, kill, resume. `devices`: ranks at most; `precision`: the device's best."""
    with tempfile.TemporaryDirectory(prefix="aquila-accept-") as name:
        runs = Runs(Path(name).resolve(), devices)
        table.check("training", "demo corpus", runs.prepare)
        exact = "precision=fp32"
        half = min(2, devices)
        fp32: list[dict] = []

        def first() -> Measured:
            fp32.extend(runs.run("one", 1, exact, "batch_size=4"))
            return Measured(fp32[-1]["loss"], fp32[0]["loss"], detail="last loss, first loss")

        table.check("training", "1 rank, fp32, ZeRO-2: loss falls", first)
        for stage in (1, 2, 3):
            word = f"zero_stage={stage}"
            table.check(
                "training", f"2 ranks, fp32, ZeRO-{stage} = 1 rank",
                lambda word=word, stage=stage: Measured(
                    loss_difference(fp32, runs.run(f"two-{stage}", 2, exact, word)), 1e-5
                ),
                needs=("collectives",),
            )  # fmt: skip

        def other_way() -> Measured:
            """What the device's default is not: reduced during backward, or after it."""
            found = runs.run("other-way", 2, exact, "zero_stage=2", f"overlap_comm={not overlaps}")
            return Measured(loss_difference(fp32, found), 1e-5)

        name = f"2 ranks, fp32, overlap_comm={not overlaps} = 1 rank"
        table.check("training", name, other_way, needs=("collectives",))
        rest = (f"precision={precision}", f"batch_size={4 // half}")

        def resumed() -> Measured:
            straight = runs.run("straight", half, *rest)
            again = runs.killed("killed", half, *rest)
            return Measured(loss_difference(straight, again), 1e-3, detail="0 where it is bit for bit")

        table.check("training", f"{half} rank(s), {precision}: save, kill, resume", resumed)
