"""What many layers need of one tensor, made once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class MadeOnce:
    """What was made of the last few tensors, the values of which it took.

    A tensor is known by its memory and version, not as an object: ZeRO-3 hands each layer an alias of its
    own. It is kept as long as what was made of it, so that its memory is nobody else's.
    """

    def __init__(self, kept: int = 8) -> None:
        self.kept = kept
        self._made: OrderedDict[Hashable, tuple[Tensor, Any]] = OrderedDict()

    def of(self, tensor: Tensor, make: Callable[[], Any], *more: Hashable) -> Any:
        """What `make` returned for these values and `more`."""
        key = (*_identity(tensor), *more)
        if key not in self._made:
            self.put(tensor, make(), *more)
        return self._made[key][1]

    def put(self, tensor: Tensor, made: Any, *more: Hashable) -> None:
        """As if `made` had been made."""
        self._made[(*_identity(tensor), *more)] = tensor, made
        while len(self._made) > self.kept:
            self._made.popitem(last=False)


def _identity(x: Tensor) -> tuple[Hashable, ...]:
    if x.is_inference():  # nobody counts its versions
        return (id(x),)
    return (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x._version)
