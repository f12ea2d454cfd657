"""Reading of files and values into typed models, with errors a person can act on."""

import difflib
import math
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from aquila.core.errors import UserError
from aquila.core.text_files import read_text


class StrictModel(BaseModel):
    """Immutable; refuses unknown keys and values of another type (text for a number, a number for yes/no)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


Model = TypeVar("Model", bound=BaseModel)


class _NumberLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-8` as text for want of a dot; this loader reads it as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        # A key said twice is a mistake that plain YAML resolves in silence to the second.
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                raise UserError(
                    f"{node.start_mark.name}, line {line}: key '{key_node.value}' stands a second time "
                    f"(first in line {seen[key_node.value]}); remove one"
                )
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


_FLOAT = yaml.resolver.re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$")
_NumberLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """YAML to Python values. Raises `UserError` naming `where` and the line."""
    loader = _NumberLoader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises `UserError` for anything else."""
    data = parse_yaml(read_text(path), str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold 'key: value' lines, not a {type(data).__name__}")
    return data


def nearest(key: str, known: list[str]) -> str:
    """'; did you mean ...?' for a key that looks like a known one, else the empty string."""
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def validate(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """`values` as a `model`. Raises `UserError` that lists every mistake, all at once."""
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key}: {value} is not a finite number")
    # 1e5 is a float to YAML and JSON, a count to a person; a float field takes the integer as well.
    values = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in values.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, item) for item in error.errors()]
        raise UserError(f"{where}: " + "\n  ".join(problems)) from None


def _explain(model: type[BaseModel], item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"] if not isinstance(part, int)) or ""
    if item["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(key, list(model.model_fields))}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message.startswith("Input ") else message
    got = f" (got {item['input']!r})" if key else ""
    return f"{key}: {message}{got}" if key else message
