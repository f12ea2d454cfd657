"""Linear layers that multiply in float8, by torchao's training conversion (https://github.com/pytorch/ao).

The three products of a layer (forward, and two in backward) take float8 operands, scaled on the fly;
parameters, their names and all results stay as they are. Recipes: "tensorwise", one scale a tensor, e4m3
and for gradients e5m2; "rowwise", one scale a row, e4m3 throughout, powers of two. Emulated, operands are
rounded to the same float8 values and the products are fp32's: slow, for a device without such products.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from aquila.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

NATIVE, EMULATED = "native", "emulated"
OLDEST = (0, 18)
"""Older ones lack the workaround for a miscompiled float8 store that torch 2.13's compiled blocks meet."""
_INSTALL = "install it: python -m pip install 'torchao>=0.18'"


def problem() -> str | None:
    """Why torchao cannot be used here, and what to do; None when nothing speaks against it.

    Reads its version alone: importing it takes seconds.
    """
    try:
        found = version("torchao")
    except PackageNotFoundError:
        return f"torchao is not installed; {_INSTALL}"
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    return f"torchao {found} is too old; {_INSTALL}" if numbers < OLDEST else None


def load() -> ModuleType:
    """`torchao.float8`. Raises `UserError` when it is missing, too old, or does not load with this torch."""
    if text := problem():
        raise UserError(f"fp8: {text}")
    try:
        with _quiet():
            return import_module("torchao.float8")
    except Exception as error:  # whatever a package made for another torch comes to grief on
        raise UserError(
            f"fp8: torchao {version('torchao')} does not load with this torch ({error}); {_INSTALL}, or say "
            "fp8: false"
        ) from None


def convert(layers: "nn.Module", recipe: str, *, emulate: bool) -> None:
    """Every `nn.Linear` within `layers`, subclasses included, multiplies in float8. Raises `UserError`."""
    float8 = load()
    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    float8.convert_to_float8_training(layers, config=config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Importing torchao warns of kernels for quantized inference that it does not find, and of itself."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
