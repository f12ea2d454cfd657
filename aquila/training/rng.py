"""The state of every generator that a training step may draw from."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The generators' states, to be kept: numbers, texts and tensors alone."""
    numpy: Any = np.random.get_state()
    name, keys, *rest = numpy
    numpy_state = (name, keys.tolist(), *rest)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        state["device"] = torch.get_device_module().get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts the generators where `random_state` found them. Once numpy's keys were kept as an array."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "device" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["device"])
