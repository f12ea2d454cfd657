"""Protects: versions that do not go together are found, whichever device."""

import pytest

from aquila.launch.device_probe import load_failure, mismatches


def facts(versions: dict[str, str], **more: object) -> dict:
    return {"device": "cpu", "versions": versions, "toolkit": False, "unseen": [], **more}


def test_what_goes_together() -> None:
    assert mismatches(facts({"torch": "2.13.0+cpu"})) == []
    assert mismatches(facts({"torch": "2.13.0", "torch_npu": "2.13.0.post1"}, toolkit=True)) == []
    assert mismatches(facts({"torch": "2.13.0", "CUDA": "13.0"})) == []  # a laptop with PyPI's torch


def test_a_torch_npu_for_another_torch() -> None:
    (problem,) = mismatches(facts({"torch": "2.13.0", "torch_npu": "2.12.0"}, toolkit=True))
    assert "made for torch 2.12, but torch is 2.13.0" in problem


def test_an_npu_without_cann() -> None:
    (problem,) = mismatches(facts({"torch": "2.13.0", "torch_npu": "2.13.0"}))
    assert "name its set_env.sh: AQUILA_CANN_SET_ENV=" in problem


def test_a_gpu_that_torch_does_not_see() -> None:
    (problem,) = mismatches(facts({"torch": "2.13.0", "CUDA": "13.0"}, unseen=["/dev/nvidia0"]))
    assert "driver" in problem
    assert "CUDA 13.0" in problem


def test_a_chip_that_cannot_train() -> None:
    assert mismatches(facts({"torch": "2.13.0"}, unsupported="Ascend910A is old")) == ["Ascend910A is old"]


def test_a_cuda_build_of_torch_beside_torch_npu() -> None:
    found = facts({"torch": "2.13.0", "torch_npu": "2.13.0", "CUDA": "13.0"}, toolkit=True)
    (problem,) = mismatches(found)
    assert "CUDA build, which torch_npu refuses" in problem
    assert "TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu" in problem


def test_a_cann_too_old_for_its_torch_npu() -> None:
    found = facts({"torch": "2.9.0", "torch_npu": "2.9.0", "CANN": "8.2.RC1"}, toolkit=True)
    (problem,) = mismatches(found)
    assert "made for CANN 8.5.0" in problem
    assert "torch 2.6.0 with torch_npu 2.6.0" in problem


# What torch_npu 2.13.0 writes; the traceback before it left out.
END = """
The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "<string>", line 1, in <module>
RuntimeError: Failed to load the backend extension: torch_npu. You can disable extension auto-loading with \
TORCH_DEVICE_BACKEND_AUTOLOAD=0.
"""
HOOK = "[ERROR] 2026-11-26-08:00:00 (PID:1, Device:-1, RankID:-1) ERR99999 UNKNOWN applicaiton exception\n"
OBJECT = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        (f"ImportError: libhccl.so: {OBJECT}", "name its set_env.sh: AQUILA_CANN_SET_ENV="),
        (
            "ImportError: /x/torch_npu/lib/libtorch_npu.so: undefined symbol: aclrtBinaryLoadFromData",
            "is older than this torch_npu asks for",
        ),
        (
            "RuntimeError: Two accelerators cannot be used at the same time in PyTorch: npu and gpu.",
            "TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu",
        ),
        (f"ImportError: libascend_hal.so: {OBJECT}", "mount /usr/local/Ascend/driver"),
        ("ModuleNotFoundError: No module named 'torch'", "run: bash scripts/install.sh"),
    ],
)
@pytest.mark.parametrize("after", ["", END, END + HOOK])
def test_each_load_failure_has_its_own_remedy(cause: str, remedy: str, after: str) -> None:
    said = load_failure(f"Traceback (most recent call last):\n  File ...\n{cause}\n{after}")
    assert said.startswith(cause)
    assert remedy in said
    assert said.count("; ") >= 1
    others = ("set_env.sh:", "is older than", "TORCH_INDEX_URL", "mount /usr", "run: bash scripts/install.sh")
    assert sum(word in said for word in others) in (1, 2 if "TORCH_INDEX_URL" in said else 1)
