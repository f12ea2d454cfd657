"""Values of a foreign config.json, each of the type that it must have."""

from typing import Any

from aquila.core.errors import UserError


class Reader:
    """Typed values of one table of a foreign config.json; a wrong one is a `UserError` with its key."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {key} must be a whole number above 0, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number that is not below 0."""
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise UserError(f"{self.where}: {key} must be a number, not below 0, got {value!r}")
        return float(value)

    def table(self, key: str) -> dict[str, Any]:
        """A table; empty where the file has none."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {key} must be a table, got {value!r}")
        return value
