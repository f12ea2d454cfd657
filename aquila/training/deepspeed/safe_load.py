"""Reading what `torch.save` wrote without running what it holds: weights only, and a short list of types.

A file of `torch.save` is a pickle, and a pickle can name any function to be called while it is read. Whoever
writes a checkpoint could so run code on every rank that resumes from it; a checksum does not help, because
the same hand writes the manifest. Everything in a checkpoint is therefore read by `load` here, which makes
tensors, numbers, texts, dicts and lists, and beside these only the types of `_allowed`.

Guarded by tests/integration/test_hostile_checkpoint.py, which plants a call in every file of a checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from aquila.core.errors import UserError

_torch_load = torch.load


def _allowed() -> list[Any]:
    """Plain data that checkpoints hold: of DeepSpeed's shards, and of random states as they once were."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    build = np.empty(0).__reduce__()[0]
    # As numpy 1 names it, and as numpy 2 does.
    arrays: list[Any] = [(build, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    arrays += [np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, *arrays]


def load(file: Any, map_location: Any = "cpu", pickle_module: Any = None, **options: Any) -> Any:
    """The content of a file of a checkpoint; nothing in it is run. Arguments are those of `torch.load`.

    Raises `UserError` when the file is damaged or asks for anything but data.
    """
    options["weights_only"] = True
    try:
        with torch.serialization.safe_globals(_allowed()):
            return _torch_load(file, map_location, **options)
    except Exception as error:  # damaged bytes make the unpickler fail in every way that Python knows
        raise UserError(
            f"{file}: not read ({_reason(error)}). Files of a checkpoint hold data alone: this one is "
            "damaged, or made to run code, which was not done. Use a copy from a source you know"
        ) from None


def _reason(error: Exception) -> str:
    """The first line that says something, without torch's advice to read the file unsafely."""
    text = str(error)
    for start in ("WeightsUnpickler error:", "Unsupported"):
        if start in text:
            text = text[text.index(start) :].removeprefix("WeightsUnpickler error:")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].split(" Please use `torch.serial")[0][:200]


@contextmanager
def safely() -> Iterator[None]:
    """DeepSpeed reads by `torch.load(..., weights_only=False)` in many places: meanwhile that is `load`."""
    before = torch.load
    torch.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = before
