"""The learning rate as a pure function of the step."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquila.config import RunConfig
from aquila.core.errors import UserError
from aquila.training.schedule import Schedule, make_schedule

STYLES = ("cosine", "linear", "constant", "wsd")


def schedule(style: str = "cosine", total: int = 100, warmup: int = 10, decay: int | None = None) -> Schedule:
    return Schedule(1.0, 0.1, total, warmup, decay or total, style)


@given(st.sampled_from(STYLES), st.integers(1, 500), st.data())
def test_rises_to_the_peak_then_never_rises(style: str, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    rates = [schedule(style, total, warmup).learning_rate(step) for step in range(1, total + 1)]
    assert all(0 < rate <= 1.0 + 1e-12 for rate in rates)
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    falling = rates[max(0, warmup - 1) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    assert min(rates[warmup:], default=0.1) >= 0.1 - 1e-12


def test_known_points() -> None:
    assert schedule().learning_rate(55) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert schedule().learning_rate(100) == pytest.approx(0.1)
    assert schedule("linear").learning_rate(55) == pytest.approx(0.55)
    assert schedule("constant").learning_rate(100) == 1.0
    assert schedule("wsd").learning_rate(90) == 1.0
    assert schedule("wsd").learning_rate(95) == pytest.approx(0.55)
    assert schedule(decay=50).learning_rate(80) == pytest.approx(0.1)  # stays at the end of the decay


def test_length_and_warm_up_of_a_run() -> None:
    run = RunConfig(batch_size=2, gradient_accumulation_steps=3, epochs=5, warm_up=0.01)
    made = make_schedule(run, samples_per_epoch=100, world_size=4)
    assert made.total_steps == 500 // 24
    assert made.warmup_steps == 1
    assert made.final == pytest.approx(run.lr / 10)
    fixed = RunConfig(train_iters=300, warm_up_iters=7, min_lr=0.0, lr_decay_iters=200)
    made = make_schedule(fixed, samples_per_epoch=3, world_size=1)
    assert (made.total_steps, made.warmup_steps, made.decay_steps, made.final) == (300, 7, 200, 0.0)


def test_a_corpus_smaller_than_a_batch_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="fewer than one global batch"):
        make_schedule(RunConfig(batch_size=32), samples_per_epoch=31, world_size=1)
