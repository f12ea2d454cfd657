"""What one rank does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from aquila.core.errors import UserError

Result = TypeVar("Result")


def on_first_rank(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank; its `UserError` is raised on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
