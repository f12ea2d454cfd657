"""lm-evaluation-harness over checkpoints, beside the training, in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from aquila.config.run import LmEval
from aquila.core.checkpoints import step_of
from aquila.training.console import say
from aquila.training.export import link_checkpoint, one_thread

FOLDER = "lm_eval"
"""In the run folder: what the harness itself writes, by step."""

Scores = dict[str, float]
"""`task/metric` to its value."""


class LmEvaluator:
    """Scores every checkpoint whose step is a multiple of `config.every`, one after the other. Rank 0 alone.

    Each is exported for transformers and scored by processes of their own, in a line that training does not
    wait for; the checkpoint may be dropped meanwhile. What fails is a warning, with the log's place.
    told(step, scores): called from a thread of its own.
    """

    def __init__(self, run_dir: Path, config: LmEval, told: Callable[[int, Scores], None]) -> None:
        self._folder = run_dir / FOLDER
        self._log = run_dir / "logs" / "lm_eval.log"
        self._config, self._told = config, told
        self._line = ThreadPoolExecutor(1, thread_name_prefix="lm_eval")
        self._waiting: list[Future] = []
        for left in self._folder.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)

    def __call__(self, checkpoint: Path) -> None:
        """A checkpoint has been finished."""
        if step_of(checkpoint) % self._config.every:
            return
        source = self._folder / f".{checkpoint.name}.source"
        try:
            link_checkpoint(checkpoint, source)
        except OSError as error:
            say(f"warning: {checkpoint} is not scored: {error}")
            return
        self._waiting.append(self._line.submit(self._score, source, step_of(checkpoint)))

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        """Until the line is empty. alive: called every second meanwhile."""
        while wait(self._waiting, timeout=1).not_done:
            alive()
        self._waiting.clear()

    def _score(self, source: Path, step: int) -> None:
        exported = source.with_suffix(".hf")
        try:
            shutil.rmtree(exported, ignore_errors=True)
            convert = ["aquila.convert", "--to", "hf", "--input", str(source), "--output", str(exported)]
            output = self._folder / f"step-{step:08d}"
            status = self._run(convert) or self._run(self._harness(exported, output))
            if status:
                say(f"warning: step {step} was not scored by lm_eval (status {status}); see {self._log}")
                return
            scores = read_scores(output)
            self._told(step, scores)
            say(
                f"lm_eval at step {step}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            )
        except Exception as error:  # whatever it is, training is worth more
            say(f"warning: step {step} was not scored by lm_eval: {error}")
        finally:
            for folder in (source, exported):
                shutil.rmtree(folder, ignore_errors=True)

    def _harness(self, model: Path, output: Path) -> list[str]:
        config = self._config
        # Documents begin with [CLS] in training: so does what is scored.
        command = ["lm_eval", "run", "--model", "hf", "--device", config.device, "--batch_size", "1"]
        command += ["--model_args", f"pretrained={model},dtype=float32,add_bos_token=True"]
        command += ["--tasks", ",".join(config.tasks), "--output_path", str(output)]
        for key in ("include_path", "num_fewshot", "limit"):
            if (value := getattr(config, key)) is not None:
                command += [f"--{key}", str(value)]
        return command

    def _run(self, words: list[str]) -> int:
        self._log.parent.mkdir(exist_ok=True)
        environment = one_thread()
        if self._config.include_path is not None:  # local tasks: nothing is looked for elsewhere
            environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} | environment
        with self._log.open("ab") as log:
            return subprocess.run(
                [sys.executable, "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            ).returncode


def read_scores(output: Path) -> Scores:
    """The newest results file below `output`. Raises `OSError` where there is none."""
    files = sorted(output.rglob("results_*.json"), key=os.path.getmtime)
    if not files:
        raise FileNotFoundError(f"{output} holds no results_*.json")
    results: dict[str, dict[str, Any]] = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in metric
        and metric != "sample_len"
    }  # fmt: skip
