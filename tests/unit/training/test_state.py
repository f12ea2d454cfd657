"""The state that a checkpoint carries."""

import pytest

from aquila.training.state import TrainState


def test_advancing() -> None:
    state = TrainState()
    state.advance(4, 400, 2.0, skipped=False, bad=False)
    assert (state.step, state.consumed_samples, state.consumed_tokens, state.mean_loss) == (1, 4, 400, 2.0)
    state.advance(4, 400, 1.0, skipped=False, bad=False)
    assert state.mean_loss == pytest.approx(1.98)
    assert TrainState(**state.to_dict()) == state


def test_bad_steps_count_in_a_row_and_leave_the_mean_alone() -> None:
    state = TrainState()
    state.advance(1, 1, 3.0, skipped=False, bad=False)
    for expected in (1, 2):
        state.advance(1, 1, float("nan"), skipped=True, bad=True)
        assert state.bad_steps == expected
    assert state.mean_loss == 3.0
    state.advance(1, 1, 3.0, skipped=False, bad=False)
    assert state.bad_steps == 0
