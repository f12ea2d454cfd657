"""Protects: versions that do not go together are found, whichever device."""

from aquila.launch.device_probe import mismatches


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
    assert "source its set_env.sh" in problem


def test_a_gpu_that_torch_does_not_see() -> None:
    (problem,) = mismatches(facts({"torch": "2.13.0", "CUDA": "13.0"}, unseen=["/dev/nvidia0"]))
    assert "driver" in problem
    assert "CUDA 13.0" in problem
