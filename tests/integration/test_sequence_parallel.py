"""Ranks that share samples compute what one rank computes, and each holds less."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.launch_helpers import ROOT, environment
from tests.integration.training_runs import MODEL, add_corpus, add_model, make_project, metrics, run_jobs

FOLDER = Path(__file__).parent
QUICK = ("documents", "one key head, all layers again")
OTHERS = ("selective", "triangle", "no documents", "scaled angles", "compiled")
LONG = MODEL | {"dim": 128, "n_layers": 8, "max_seq_len": 4096, "checkpoint_activations": False}
"""A model of 7 MB whose activations take some hundred."""


def compare(*names: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "sequence_parallel_ranks.py"), *names],
        cwd=ROOT,
        env=environment(ROOT) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = [json.loads(line) for line in re.findall(r"^CASE (.*)$", done.stdout, re.MULTILINE)]
    assert len(found) == len(names), done.stderr
    return found


def check(names: tuple[str, ...]) -> None:
    for case in compare(*names):
        assert len(case["apart"]) == 3
        for loss, gradient in case["apart"]:  # of 1, 2 and 4 ranks a sample
            assert loss <= 1e-6, case
            assert gradient <= 1e-6, case


def test_loss_and_gradients_are_those_of_one_rank():
    """With documents, tokens that do not count, and fewer heads of keys and values than ranks."""
    check(QUICK)


@pytest.mark.slow
def test_of_every_kind_of_attention_and_recomputation():
    check(OTHERS)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    project = make_project(tmp_path_factory.mktemp("shared"))
    add_model(project, "long", LONG)
    add_corpus(project, "long", 400)
    return project


def job(size: int, experiment: str, *overrides: str, model: str = "small", **more) -> dict:
    """4 ranks; 4 samples a step, whatever number of ranks shares one."""
    words = (
        "precision=fp32", f"gradient_accumulation_steps={size}", "train_iters=4", "eval_interval=2",
        "batch_size=1", f"sequence_parallel={size}", "document_mask=True", "save_interval=2",
    )  # fmt: skip
    return {"ranks": 4, "args": ["run.yaml", model, experiment, *words, *overrides], **more}


@pytest.mark.slow
def test_runs_that_share_samples_are_those_that_do_not(project):
    """Under every ZeRO stage, saved, and resumed with another number of ranks a sample; each holds less."""
    resumed = "resume=checkpoints_out/{}/0/checkpoints/step-00000002"
    jobs = [job(1, "one", "zero_stage=2")]
    jobs += [
        job(size, f"zero{stage}-{size}", f"zero_stage={stage}") for stage in (1, 2, 3) for size in (2, 4)
    ]
    jobs += [
        job(4, "two-to-four", "zero_stage=3", resumed.format("zero3-2")),
        job(1, "four-to-one", "zero_stage=2", resumed.format("zero2-4")),
    ]
    short = (
        "eval_interval=0", "train_iters=2", "gradient_accumulation_steps=1", "document_mask=False",
        "data_prefix=data/long_text_document",
    )  # fmt: skip
    jobs += [job(size, f"long-{size}", *short, model="long", memory="steps") for size in (1, 2, 4)]
    statuses, printed = run_jobs(project, jobs, timeout=600)
    assert statuses == [[0] * 4] * len(jobs), printed
    assert "4 neighbouring ranks share each sample, each with 8 of its 32 positions" in printed
    plain = metrics(project, "one")
    for experiment in [made["args"][2] for made in jobs[1:9]]:
        records = metrics(project, experiment)
        assert len(records) == (2 if "-to-" in experiment else 4)
        for one, other in zip(plain[-len(records) :], records, strict=True):
            assert (one["step"], one["consumed_samples"]) == (other["step"], other["consumed_samples"])
            for key in ("loss", "grad_norm", "valid_loss"):
                if key in one:
                    assert other[key] == pytest.approx(one[key], abs=2e-6), (experiment, key)
    peaks = [float(part) for part in re.findall(r"STEP \d ([\d.]+)", printed)]
    alone, two, four = (max(peaks[at : at + 4]) for at in (0, 4, 8))
    assert two < 0.7 * alone, peaks
    assert four < 0.5 * alone, peaks
