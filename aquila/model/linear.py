"""The linear layer; and several of one input as one product, each weight a parameter of its own all the same.

One large product is faster than several small ones, and the gradient of the input is summed inside it. The
weights need not be copied for that: those that lie one behind another in memory, as ZeRO's flat buffer of
weights has them, are one matrix already.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aquila.backend import get_backend
from aquila.model.late_linear import LateLinear


class Linear(nn.Linear):
    """x weight^T, by the device's product."""

    late = False
    """The weight is gone between forward and backward (ZeRO-3)."""

    def reset_parameters(self) -> None:
        """Nothing: values come later."""

    def forward(self, x: Tensor) -> Tensor:
        if self.late and torch.is_grad_enabled():
            return LateLinear.apply(x, self.weight)
        return get_backend(x.device.type).linear(x, self.weight)


class JoinedProducts(nn.Module):
    """A module some of whose linear layers, `JOINED`, take the same input."""

    JOINED: ClassVar[tuple[str, ...]] = ()
    TAKEN_APART: ClassVar[bool] = True
    """Whether what follows takes the outputs one by one, not side by side."""
    whole: Tensor | nn.Module | None = None
    """Their weights as one matrix on the same memory, or one layer with them; None while they lie apart."""

    def join(self, *, copy: bool = False) -> None:
        """Makes one product of them where their weights lie side by side; with `copy` puts them so.

        To be called again after the weights have moved. Layers of other kinds have a `join` of their own.
        """
        parts = [getattr(self, name) for name in self.JOINED]
        if all(type(part) is Linear for part in parts):
            weights = [part.weight for part in parts]
            whole = put_side_by_side(weights) if copy else side_by_side(weights)
        else:
            kind = type(parts[0])
            whole = kind.join(parts) if copy and hasattr(kind, "join") else None
        # Not a parameter and not a submodule: names in files, and what an optimizer sees, stay as they are.
        object.__setattr__(self, "whole", whole)

    def products(self, x: Tensor) -> Tensor:
        """The outputs of `JOINED` side by side: x (..., K) to (..., sum of N)."""
        if self.whole is None:
            return torch.cat([getattr(self, name)(x) for name in self.JOINED], dim=-1)
        if isinstance(self.whole, nn.Module):
            return self.whole(x)
        whole = self.whole
        if torch.is_grad_enabled():
            whole = _OnePiece.apply(whole, *(getattr(self, name).weight for name in self.JOINED))
        return get_backend(x.device.type).linear(x, whole)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of `JOINED` one by one."""
        if self.whole is None:
            return tuple(getattr(self, name)(x) for name in self.JOINED)
        return self.products(x).split([getattr(self, name).out_features for name in self.JOINED], dim=-1)


def join_products(model: nn.Module, *, copy: bool = False) -> None:
    """`join` for every module of a model.

    Without `copy`, which is for generation, not where the device copies each output taken from a joined one.
    """
    for module in model.modules():
        if isinstance(module, JoinedProducts):
            device = getattr(module, module.JOINED[0]).weight.device.type
            if copy or not module.TAKEN_APART or get_backend(device).TAKES_PARTS:
                module.join(copy=copy)


def in_stored_order(model: nn.Module) -> list[nn.Parameter]:
    """The parameters in the order in which one buffer should hold them: those of one product side by side."""
    named = dict(model.named_parameters())
    groups = {
        f"{prefix}.{module.JOINED[0]}.weight": [f"{prefix}.{name}.weight" for name in module.JOINED]
        for prefix, module in model.named_modules()
        if isinstance(module, JoinedProducts)
    }
    ordered: dict[str, nn.Parameter] = {}
    for name in named:
        for each in groups.get(name, [name]):
            ordered.setdefault(each, named[each])
    return list(ordered.values())


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """Matrices (N_i, K) that lie one behind another as one (sum of N_i, K), else None; nothing is copied."""
    first, place = parts[0], parts[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if not (part.is_contiguous() and part.dtype == first.dtype and part.shape[1:] == first.shape[1:]):
            return None
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != place:
            return None
        place += part.numel()
    if first.numel() == 0 or first.device.type == "meta":  # divided among ranks: there is nothing here
        return None
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def put_side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """As `side_by_side`; parts that lie apart are copied together first, and become views of the copy."""
    whole = side_by_side(parts)
    if whole is None:
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
    return whole


class _OnePiece(torch.autograd.Function):
    """`whole` itself; its gradient is that of `parts`, whose memory it is, in their order."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.rows = [len(part) for part in parts]
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradient.split(ctx.rows)
