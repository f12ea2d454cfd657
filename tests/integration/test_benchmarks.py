"""The benchmarks run, small: these tests fail on errors, never on a figure."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from aquila.backend import fp8

HIDE_DEEPSPEED = "raise ImportError('hidden for this test')\n"


def run(root, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=root, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SMALL = ("--preset", "small", "--rounds", "1", "--contenders", "ours")


@pytest.mark.parametrize("deepspeed", [True, False], ids=["engine", "torch alone"])
def test_a_step_beside_transformers(root, tmp_path, deepspeed):
    names = ("transformers-fp32", "transformers-pure") if deepspeed else ()
    if not deepspeed:
        (tmp_path / "deepspeed.py").write_text(HIDE_DEEPSPEED)
    paths = {} if deepspeed else {"PYTHONPATH": str(tmp_path)}
    result = run(root, "benchmarks/train_step.py", *SMALL, *names, **paths)
    assert not result["failed"]
    assert ("torch alone" in result["contenders"]["ours"]["what"]) is not deepspeed
    losses = [facts["first_loss"] for facts in result["contenders"].values()]
    assert max(losses) - min(losses) < 0.02  # the same weights and tokens
    assert result["matmul_peak_at_shapes_tflops"] > 0


def test_a_contender_that_fails_is_named_and_the_others_are_measured(root):
    result = run(root, "benchmarks/train_step.py", *SMALL, "nothing-amp")
    assert "nothing" in result["failed"]["nothing-amp"]
    assert result["contenders"]["ours"]["tokens_per_second"] > 0


def test_one_at_a_time(root):
    result = run(root, "benchmarks/train_step.py", *SMALL, "--one-at-a-time")
    assert result["contenders"]["ours"]["peak_memory_gib"] > 0


@pytest.mark.parametrize("way", [[], ["--exchange"]])
def test_traffic_of_two_ranks_is_the_formulas(root, way):
    result = run(root, "benchmarks/traffic.py", "--ranks", "2", *way)
    assert result["counted"] == pytest.approx(result["formula"], rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(fp8.problem() is not None, reason=str(fp8.problem()))
def test_our_step_with_float8_layers(root):
    result = run(root, "benchmarks/train_step.py", *SMALL, "ours-fp8")
    assert not result["failed"]
    ours, narrow = (result["contenders"][name] for name in ("ours", "ours-fp8"))
    assert "float8 tensorwise" in narrow["what"]
    assert 0 < abs(narrow["first_loss"] - ours["first_loss"]) < 0.02


TITAN_NEEDS = ("torchtitan", "spmd_types", "tyro", "triton")


@pytest.mark.skipif(
    missing := [name for name in TITAN_NEEDS if find_spec(name) is None],
    reason=f"benchmarks/README.md says how to install what is missing: {', '.join(missing)}",
)
def test_a_step_beside_torchtitan(root, tmp_path):
    """Its loss is that of the same weights: of transformers' Llama to fp32's accuracy; grouped queries."""
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1000, "max_seq_len": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    names = ("torchtitan-amp", "torchtitan-fp32", "transformers-fp32")
    result = run(root, "benchmarks/train_step.py", "--config", tmp_path, *SMALL, *names)
    assert not result["failed"]
    losses = {name: facts["first_loss"] for name, facts in result["contenders"].items()}
    assert losses["torchtitan-fp32"] == pytest.approx(losses["transformers-fp32"], rel=1e-6)
    assert losses["torchtitan-amp"] == pytest.approx(losses["ours"], abs=2e-3)


@pytest.mark.slow
def test_muon_beside_adamw(root):
    result = run(root, "benchmarks/muon_curve.py", "--steps", "20", "--rates", "1e-3", "--muon-rates", "2e-2")
    assert set(result) == {"adamw", "muon"}
    for runs in result.values():
        ((_, points),) = runs.items()
        assert points[-1][1] < points[0][1]
