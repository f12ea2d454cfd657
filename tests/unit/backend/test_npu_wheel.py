"""The whole model's training step through the real torch_npu, in shapes alone, on a stub of CANN."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.npu_simulator import cann, kernels

ROOT = Path(__file__).resolve().parents[3]
TRACE = Path(cann.__file__).with_name("trace.py")
BASE = {"npu_rms_norm", "npu_rms_norm_backward", "npu_swiglu", "npu_swiglu_backward"}
BASE |= {"npu_rotary_mul", "npu_cross_entropy_loss"}
FUSED = {"npu_fusion_attention", "npu_fusion_attention_grad"}
TRIANGLE = {"npu_scaled_masked_softmax", "npu_scaled_masked_softmax_backward"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    if lack := cann.missing():
        pytest.skip(lack)
    made = cann.build(tmp_path_factory.mktemp("npu"), compute=False)
    return {**os.environ, **made, "PYTHONPATH": f"{ROOT}:{made['PYTHONPATH']}"}


def run(environment, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_training_step_traces_through_the_vendors_code(environment):
    cases = {
        "fused none float32": BASE | FUSED,
        "fused full bfloat16": BASE | FUSED,
        "fused selective float16 packed": BASE | FUSED,
        "triangle full bfloat16": BASE | TRIANGLE,
        "triangle selective bfloat16 packed": BASE | TRIANGLE,
    }
    reports = run(environment, str(TRACE), *cases)
    for case, operators in cases.items():
        assert reports[case]["wrong"] == []
        assert set(reports[case]["operators"]) >= operators, case


def test_the_stand_in_kernels_have_the_real_schemas(environment):
    code = (
        "import json, sys, torch, torch_npu\n"
        "print(json.dumps({n: str(getattr(torch.ops.npu, n).default._schema) for n in sys.argv[1:]}))"
    )
    real = run(environment, "-c", code, *kernels.SCHEMAS)
    kernels.define()

    ours = {name: str(getattr(torch.ops.npu, name).default._schema) for name in kernels.SCHEMAS}
    assert real == ours
