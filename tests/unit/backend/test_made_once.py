"""Protects: what is made of a tensor is made once for all its aliases, anew when its values change."""

import torch

from aquila.backend.made_once import MadeOnce


def test_aliases_are_one_tensor_and_other_values_another() -> None:
    once, made = MadeOnce(), []

    def of(x: torch.Tensor, *more: str) -> int:
        return once.of(x, lambda: made.append(x.clone()) or len(made), *more)

    table = torch.arange(64.0)
    first, second = table[None, :16], table[None, 1:17]
    assert of(first) == of(table[None, :16]) == of(first.detach()) == 1
    assert of(second) == 2
    assert of(first.T) == 3
    assert of(first, "bf16") == 4
    table[0] = 7
    assert of(first) == 5


def test_memory_that_is_used_again_is_not_mistaken_for_what_it_held() -> None:
    once = MadeOnce(kept=3)
    for number in range(20):
        assert once.of(torch.full((4,), number), lambda n=number: n) == number
    assert len(once._made) == 3


def test_tensors_of_inference_mode_are_told_apart_as_objects() -> None:
    once = MadeOnce()
    with torch.inference_mode():
        x = torch.zeros(4)
        assert once.of(x, lambda: 1) == once.of(x, lambda: 2) == 1
        assert once.of(x[:], lambda: 3) == 3
