"""Whose gradient was not finite."""

import pytest
import torch

from aquila.training.nonfinite import GradientCheck, what_is_not_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_anywhere_is_seen_and_large_ones_are_not_bad(
    dtype: torch.dtype, value: float
) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3000, 50, dtype=dtype)) for _ in range(3)]
    check = GradientCheck(torch.device("cpu"))
    check.watch(parameters)
    weights = [torch.full_like(parameter, 60000.0).detach() for parameter in parameters]

    def step() -> bool:
        check.start()
        for _ in range(2):  # micro steps
            sum((p * w).sum(dtype=torch.float32) for p, w in zip(parameters, weights, strict=True)).backward()
        return bool(torch.isfinite(check.total))

    assert step()
    weights[1][2999, 49] = value
    assert not step()
    weights[1][2999, 49] = 1.0
    assert step()


def test_in_words() -> None:
    nan = float("nan")
    assert what_is_not_finite([1.0, nan], [0, 1]) == "loss not finite on ranks [1]"
    assert what_is_not_finite([1.0, 1.0], [1]) == "gradient not finite on ranks [1], every loss was"
    assert "when they were summed" in what_is_not_finite([1.0, 1.0], [])
