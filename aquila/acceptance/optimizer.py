"""The optimizer contract: stepped as DeepSpeed's ZeRO steps it, it equals AdamW written out in fp64."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aquila.acceptance.table import Measured, Skip, Table
from aquila.core.errors import UserError

STEPS, SIZE = 5, 1000
SETTINGS: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def check_optimizer(table: Table, backend: ModuleType, device: torch.device) -> None:
    """A line for each optimizer that a user can name here, and one for the blockwise step's kernel."""
    for kind in backend.OPTIMIZERS:
        table.check("optimizer", kind, lambda kind=kind: _contract(backend, device, kind))
    table.check("optimizer", "blockwise AdamW", lambda: Measured(_blockwise_error(backend, device), 1e-5))


def _contract(backend: ModuleType, device: torch.device, kind: str) -> Measured:
    try:
        return Measured(contract_error(backend, device, kind), 1e-5)
    except UserError as error:  # a package that is not installed
        raise Skip(str(error)) from None


def _gradients(step: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(SIZE, generator=g) * (0.1 + step) for _ in range(2)]


def _first() -> list[Tensor]:
    g = torch.Generator().manual_seed(99)
    return [torch.randn(SIZE, generator=g) for _ in range(2)]


def truth(decays: tuple[float, float]) -> list[Tensor]:
    """Two masters after `STEPS` steps of AdamW (arXiv 1711.05101, algorithm 2), in fp64."""
    beta1, beta2 = SETTINGS["betas"]
    masters = [x.double() for x in _first()]
    moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in masters]
    for step in range(1, STEPS + 1):
        for x, gradient, (m, v), decay in zip(masters, _gradients(step), moments, decays, strict=True):
            gradient = gradient.double()
            m.mul_(beta1).add_(gradient, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            x.mul_(1 - SETTINGS["lr"] * decay)
            denominator = (v / (1 - beta2**step)).sqrt() + SETTINGS["eps"]
            x.sub_(SETTINGS["lr"] * m / (1 - beta1**step) / denominator)
    return masters


def contract_error(backend: ModuleType, device: torch.device, kind: str) -> float:
    """Greatest relative error of the masters' changes after five steps.

    Two groups with a weight decay of their own, stepped one at a time, with a new gradient tensor each time:
    so DeepSpeed's ZeRO does. An optimizer that joins parameters or gradients once and for all fails.
    """
    masters = [torch.nn.Parameter(x.to(device)) for x in _first()]
    groups = [{"params": [masters[0]]}, {"params": [masters[1]], "weight_decay": 0.0}]
    lr, betas, eps, decay = SETTINGS["lr"], SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"]
    optimizer = backend.optimizer(kind, groups, lr, betas, eps, decay)
    every = optimizer.param_groups
    for step in range(1, STEPS + 1):
        for number, gradient in enumerate(_gradients(step)):
            masters[number].grad = gradient.to(device)
            optimizer.param_groups = [every[number]]
            optimizer.step()
            masters[number].grad = None
        optimizer.param_groups = every
    return _error(masters, truth((decay, 0.0)))


def _blockwise_error(backend: ModuleType, device: torch.device) -> float:
    """`backend.adamw`, the step's kernel: fp32 gradients scaled by a half, undone by its factor of 2."""
    masters = [x.to(device) for x in _first()]
    states = [(torch.zeros_like(x), torch.zeros_like(x), torch.zeros((), device=device)) for x in masters]
    weights = [x.clone() for x in masters]
    for step in range(1, STEPS + 1):
        for x, w, gradient, state in zip(masters, weights, _gradients(step), states, strict=True):
            state[2].add_(1)
            backend.adamw([(w, x, (gradient / 2).to(device), *state[:2])], state[2], SETTINGS, 2.0)
    return _error(weights, truth((SETTINGS["weight_decay"],) * 2))


def _error(masters: list[Tensor], wanted: list[Tensor]) -> float:
    errors = [
        (x.detach().cpu().double() - w).norm() / (w - first.double()).norm()
        for x, w, first in zip(masters, wanted, _first(), strict=True)
    ]
    return max(float(error) for error in errors)
