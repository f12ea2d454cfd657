"""The draw is the original's: temperature, top-k with ties, softmax, top-p by what lies before."""

import pytest
import torch

from aquila.core.errors import UserError
from aquila.generation.sampling import Sampling, draw, penalize


def original_probabilities(logits, temperature, top_k, top_p):
    """The original predictor's arithmetic, over the whole vocabulary."""
    logits = logits / temperature
    logits[logits < torch.topk(logits, top_k)[0][-1]] = -float("inf")
    probabilities = torch.softmax(logits, dim=-1)
    ordered, ids = torch.sort(probabilities, descending=True, stable=True)
    ordered[torch.cumsum(ordered, dim=-1) - ordered > top_p] = 0.0
    ordered /= ordered.sum()
    return torch.zeros_like(ordered).scatter(0, ids, ordered)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.8, 30, 0.95), (1.5, 5, 0.5), (0.5, 60, 1.0), (1.0, 60, 0.3)]
)
def test_draws_from_the_originals_distribution(temperature, top_k, top_p):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    expected = original_probabilities(logits.clone(), temperature, top_k, top_p)
    sampling = Sampling(1, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([draw(logits, sampling, generator) for _ in range(6000)])
    found = torch.bincount(draws, minlength=60) / 6000
    assert set(draws.tolist()) <= set(expected.nonzero().squeeze(-1).tolist())
    assert (found - expected).abs().max() < 0.025


def test_ties_with_the_kth_are_kept():
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = {draw(logits, Sampling(1, 1.0, 2, 1.0), generator) for _ in range(300)}
    assert drawn == {0, 1, 2, 3}


def test_the_likeliest_survives_the_smallest_top_p():
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert {draw(logits, Sampling(1, 1.0, 0, 1e-9), None) for _ in range(50)} == {1}


def test_temperature_zero_is_greedy():
    assert draw(torch.tensor([0.0, 3.0, 1.0]), Sampling(1, 0.0), None) == 1


def test_drawing_changes_no_logit():
    logits = torch.randn(50)
    before = logits.clone()
    draw(logits, Sampling(1, 0.7, 10, 0.9), None)
    penalize(logits, torch.tensor([1, 2]), 2.0)
    assert torch.equal(logits, before)


def test_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    got = penalize(torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([0, 1, 0]), 2.0)
    assert got.tolist() == [1.0, -4.0, 2.0, -2.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": -1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_values_outside_their_range_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad)).replace("_", "-")):
        Sampling(**bad)


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-30, 1e-7])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert draw(logits, Sampling(temperature=temperature, top_k=0), None) == 1
