"""lm-evaluation-harness over checkpoints, beside the training, in processes of its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aquila.config.run import LmEval
from aquila.core.checkpoints import step_of
from aquila.training.checkpoint_worker import CheckpointWorker
from aquila.training.console import say

FOLDER = "lm_eval"
"""In the run folder: what the harness itself writes, by step."""

Scores = dict[str, float]
"""`task/metric` to its value."""


class LmEvaluator(CheckpointWorker):
    """Scores every checkpoint whose step is a multiple of `config.every`, exported for transformers.

    What fails is a warning, with the log's place. told(step, scores): called from a thread of its own.
    """

    NAME, DONE = "lm_eval", "scored"

    def __init__(self, run_dir: Path, config: LmEval, told: Callable[[int, Scores], None]) -> None:
        super().__init__(run_dir / FOLDER, run_dir / "logs" / "lm_eval.log")
        self._config, self._told = config, told
        # Local tasks: nothing is looked for elsewhere.
        local = config.include_path is not None
        self._variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if local else {}

    def _wants(self, checkpoint: Path) -> bool:
        return step_of(checkpoint) % self._config.every == 0

    def _work(self, source: Path, name: str) -> None:
        step = step_of(Path(name))
        exported = source.with_suffix(".hf")
        try:
            shutil.rmtree(exported, ignore_errors=True)
            convert = ["aquila.convert", "--to", "hf", "--input", str(source), "--output", str(exported)]
            output = self._folder / f"step-{step:08d}"
            status = self._run(convert) or self._run(self._harness(exported, output), **self._variables)
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
