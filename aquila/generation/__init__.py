"""From a model to text. `generate` is the public name; it loads torch when it is first asked for."""

from typing import Any

__all__ = ["generate"]


def __getattr__(name: str) -> Any:
    if name == "generate":
        from aquila.generation.decode import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
