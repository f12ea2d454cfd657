"""What one rank does for all, and ranks that share samples."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from aquila.core.errors import UserError
from aquila.model.sequence_parallel import SequenceShard

Result = TypeVar("Result")
_TELL_SECONDS = 1.0


def on_first_rank(function: Callable[[], Result], alive: Callable[[], None] = lambda: None) -> Result:
    """What `function` returns on rank 0, on every rank; its `UserError` is raised on every rank.

    It may take longer than the group's timeout: rank 0 tells the others every second that it goes on, and
    each calls `alive`.
    """
    first = dist.get_rank() == 0
    with ThreadPoolExecutor(1, thread_name_prefix="first-rank") as pool:
        work = pool.submit(function) if first else None
        while True:
            outcome: list[Any] = [False, None, None]
            if work is not None and wait([work], timeout=_TELL_SECONDS).done:
                outcome = [True, *_result(work)]
            dist.broadcast_object_list(outcome, src=0)
            done, result, problem = outcome
            if done:
                break
            alive()
    if problem is not None:
        raise UserError(problem)
    return result


def share_samples(size: int, timeout: float) -> SequenceShard:
    """This rank's place among `size` neighbours that share each sample. All ranks together.

    DeepSpeed is told nothing of it: to ZeRO all ranks are alike, each with a part of the loss.
    """
    rank, groups = dist.get_rank(), []
    for first in range(0, dist.get_world_size(), size):
        members = list(range(first, first + size))
        groups.append(dist.new_group(members, timeout=timedelta(seconds=timeout)))
    return SequenceShard(groups[rank // size], rank % size, size)


def _result(work: Future) -> tuple[Any, str | None]:
    try:
        return work.result(), None
    except UserError as error:
        return None, str(error)
