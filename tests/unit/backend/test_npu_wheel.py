"""The whole model's training step through the real torch_npu, in shapes alone, on a stub of CANN."""

import json
import subprocess
import sys
from pathlib import Path

import npu_kernels
import npu_stub
import pytest

HERE = Path(__file__).parent
BASE = {"npu_rms_norm", "npu_rms_norm_backward", "npu_swiglu", "npu_swiglu_backward"}
BASE |= {"npu_rotary_mul", "npu_rotary_mul_backward", "npu_cross_entropy_loss"}
FUSED = {"npu_fusion_attention", "npu_fusion_attention_grad"}
TRIANGLE = {"npu_scaled_masked_softmax", "npu_scaled_masked_softmax_backward"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    wheel = npu_stub.find_wheel()
    if wheel is None:
        pytest.skip("torch_npu is not installed beside the environment (scripts/install.sh --dev does it)")
    if lack := npu_stub.missing_tool():
        pytest.skip(f"the stub of CANN cannot be built: {lack}")
    return npu_stub.build(wheel, tmp_path_factory.mktemp("stub"))


def run(environment, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "operators"),
    [
        (("fused", "none", "float32"), BASE | FUSED),
        (("fused", "full", "bfloat16"), BASE | FUSED),
        (("fused", "selective", "float16", "packed"), BASE | FUSED),
        (("triangle", "full", "bfloat16"), BASE | TRIANGLE),
        (("triangle", "selective", "bfloat16", "packed"), BASE | TRIANGLE),
    ],
)
def test_a_training_step_traces_through_the_vendors_code(environment, arguments, operators):
    report = run(environment, str(HERE / "npu_trace.py"), *arguments)
    assert report["wrong"] == []
    assert set(report["operators"]) >= operators


def test_the_stand_in_kernels_have_the_real_schemas(environment):
    code = (
        "import json, sys, torch, torch_npu\n"
        "print(json.dumps({n: str(getattr(torch.ops.npu, n).default._schema) for n in sys.argv[1:]}))"
    )
    real = run(environment, "-c", code, *npu_kernels.SCHEMAS)
    npu_kernels.define()
    import torch

    ours = {name: str(getattr(torch.ops.npu, name).default._schema) for name in npu_kernels.SCHEMAS}
    assert real == ours
