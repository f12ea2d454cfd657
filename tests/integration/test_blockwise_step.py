"""The blockwise optimizer step is DeepSpeed's bit for bit, and both are what torch alone would do."""

import json
import re
from pathlib import Path

import pytest

from tests.integration.training_runs import make_project, run_cases

RANKS = Path(__file__).parent / "zero_step_ranks.py"
FP16 = ("precision=fp16", "bmt_loss_scale=1024", "loss_scale_window=1000")
RISING = ("precision=fp16", "bmt_loss_scale=1048576", "loss_scale_window=2", "zero_stage=2")
"""A scale that overflows, falls, and rises again after two good steps."""
ONE, SUMS = "gradient_accumulation_steps=1", "gradient_accumulation_steps=3"
CASES = {
    **{
        f"{ranks} {name} {stage}": (ranks, "buckets", "clip_grad=0", stage, accumulation, *precision)
        for ranks in (1, 2)
        for name, precision in (("bf16", ["precision=bf16"]), ("fp32", ["precision=fp32"]), ("fp16", FP16))
        for stage, accumulation in (("zero_stage=1", SUMS), ("zero_stage=2", ONE))
    },
    "1 clipped bf16": (1, "same norm", "clip_grad=0.1", SUMS, "zero_stage=1", "precision=bf16"),
    "1 clipped fp16": (1, "same norm", "clip_grad=0.1", ONE, "zero_stage=2", *FP16),
    "2 clipped fp32": (2, "same norm", "clip_grad=0.1", SUMS, "zero_stage=2", "precision=fp32"),
    "2 clipped bf16": (2, "same norm", "clip_grad=0.1", ONE, "zero_stage=2", "precision=bf16"),
    "own norm": (2, "buckets", "clip_grad=0.1", ONE, "zero_stage=2", "precision=fp32"),
    "exchange": (2, "plain", "clip_grad=0", ONE, "zero_stage=2", *FP16),
    "rising": (1, "buckets", "clip_grad=0", ONE, *RISING),
    "rising as deepspeed": (1, "new scale", "clip_grad=0", ONE, *RISING),
    "autograd 1": (1, "autograd", "clip_grad=0.1", SUMS, "zero_stage=1", "precision=fp32"),
    "autograd 2": (2, "autograd", "clip_grad=0.1", ONE, "zero_stage=2", "precision=fp32"),
}
EXACT = [name for name in CASES if "zero_stage" in name or "clipped" in name]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    project = make_project(tmp_path_factory.mktemp("zero-step"))
    cases = [{"ranks": ranks, "way": way, "overrides": words} for ranks, way, *words in CASES.values()]
    printed = run_cases(project, RANKS, cases)
    rows = [json.loads(line) for line in re.findall(r"^CASE (.*)$", printed, re.MULTILINE)]
    assert len(rows) == len(CASES), printed[-6000:]
    assert not any("statuses" in row for row in rows), printed[-6000:]
    assert all(row["moved"] > 1e-4 for row in rows), rows
    return dict(zip(CASES, rows, strict=True))


@pytest.mark.parametrize("case", EXACT)
def test_six_steps_are_deepspeeds_bit_for_bit(found, case):
    """1 and 2 ranks, ZeRO-1 and 2, with and without accumulation; clipped by the same norm."""
    assert found[case]["equal"] == [True] * 6


def test_clipping_differs_in_the_last_digits_of_the_norm(found):
    steps = found["own norm"]
    assert all(ours == pytest.approx(theirs, rel=3e-7) for ours, theirs in steps["norms"][:1])
    assert steps["difference"][0] < 1e-6


def test_exchanged_gradients_are_rounded_once(found):
    assert 0 < found["exchange"]["difference"][0] < 1e-5


def test_a_raised_loss_scale_is_the_next_steps(found):
    """DeepSpeed divides by it at once. Before the first rise there is no difference, and none in that way."""
    scales = found["rising"]["scales"]
    assert scales[0] > scales[-1], "it never fell"
    assert found["rising"]["equal"] == [True] * 5 + [False]
    assert found["rising as deepspeed"]["equal"] == [True] * 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_clipping_and_adamw_are_torchs(found, ranks):
    """A release of DeepSpeed that changed gradients would show here."""
    steps = found[f"autograd {ranks}"]
    assert [norms[0] for norms in steps["norms"]] == pytest.approx(
        [norms[1] for norms in steps["norms"]], 1e-5
    )
    # Where a gradient is nearly zero, AdamW makes much of its last digits.
    assert max(steps["difference"]) < 2e-5
