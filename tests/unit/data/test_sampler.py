"""A pure function: the same samples, in the same order, however ranks and micro batches cut them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquila.data.sampler import micro_batch_indices


def global_batch(consumed: int, world_size: int, micro_batch: int, size: int) -> list[int]:
    taken = []
    while len(taken) < size:
        for rank in range(world_size):
            taken += micro_batch_indices(consumed + 0, rank, world_size, micro_batch)
        consumed += world_size * micro_batch
    return taken


@given(st.integers(0, 10**12), st.integers(1, 5))
def test_a_global_batch_is_the_next_samples_in_order(start, steps):
    for world_size in (1, 2, 3, 4):
        for micro_batch in (1, 2, 4):
            size = steps * 48
            assert global_batch(start, world_size, micro_batch, size) == list(range(start, start + size))


def test_impossible_arguments():
    for arguments in ((0, 2, 2, 1), (0, -1, 2, 1), (0, 0, 1, 0), (-1, 0, 1, 1)):
        with pytest.raises(ValueError):
            micro_batch_indices(*arguments)
