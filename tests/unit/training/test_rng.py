"""Random state goes to a file and comes back, also from files of older versions."""

import random

import numpy as np
import pytest
import torch

from aquila.training.deepspeed.safe_load import load
from aquila.training.rng import random_state, restore_random_state


def draw() -> tuple:
    return random.random(), np.random.random(), torch.rand(3).tolist()


@pytest.mark.parametrize("older", [False, True])
def test_the_generators_go_on_where_they_were(tmp_path, older: bool) -> None:
    state = random_state()
    if older:  # numpy's own tuple, with an array
        state["numpy"] = np.random.get_state()
    torch.save(state, tmp_path / "state.pt")
    expected = draw()
    restore_random_state(load(tmp_path / "state.pt"))
    assert draw() == expected


def test_it_is_written_without_types_of_numpy(tmp_path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "state.pt") == []
