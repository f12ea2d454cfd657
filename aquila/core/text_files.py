"""Reading text and JSON that somebody else wrote: whatever is wrong has a message."""

import json
import math
from pathlib import Path
from typing import Any

from aquila.core.errors import UserError


def parse_json(text: str | bytes, **options: Any) -> Any:
    """As `json.loads`, whose `options` it takes, for text of any content and size.

    Raises `ValueError`, also for brackets nested too deep and for whole numbers of thousands of digits.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def text_under(line: str, key: str, where: str) -> str:
    """The text under `key` of the JSON object in a line. Raises `UserError`, which begins with `where`."""
    try:
        text = parse_json(line)[key]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{where}: must be an object {{"{key}": "..."}}')
    return text


def is_finite(value: Any) -> bool:
    """Whether no NaN and no infinity is in `value`: a number, a text, or lists and mappings of them."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(is_finite(item) for item in value.values())
    return all(is_finite(item) for item in value) if isinstance(value, list | tuple) else True


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises `UserError` when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` with the line for broken JSON, and for duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: key '{twice}' stands twice; remove one")
        return result

    try:
        data = parse_json(read_text(path), object_pairs_hook=unique)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a JSON object, not a {type(data).__name__}")
    if not is_finite(data):
        raise UserError(f"{path}: holds NaN or an infinite number, which is no JSON")
    return data
