"""Reading of files and values into typed models, with errors a person can act on."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from aquila.core.errors import UserError
from aquila.core.text_files import is_finite, read_text


class StrictModel(BaseModel):
    """Immutable; refuses unknown keys and values of another type (text for a number, a number for yes/no)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


_LONGEST_SHOWN = 200
"""Characters of a value in a message."""
Model = TypeVar("Model", bound=BaseModel)


_LARGEST_YAML = 10_000
"""Values that a YAML file may hold, each alias counted as what it stands for."""


class _NumberLoader(yaml.SafeLoader):
    """Numbers are what they look like, as in YAML 1.2: `1e-8` is one, `0200` is 200, `1:30` is a text.

    YAML 1.1 reads a text for want of a dot, an octal number, and 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        # A key said twice is a mistake that plain YAML resolves in silence to the second.
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{node.start_mark.name}, line {line}: a key must be a plain text")
            if key_node.value in seen:
                raise UserError(
                    f"{node.start_mark.name}, line {line}: key '{key_node.value}' stands a second time "
                    f"(first in line {seen[key_node.value]}); remove one"
                )
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NumberLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in (_INT, _FLOAT)]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (
    (_INT, r"[-+]?\d[\d_]*$|0o[0-7]+$|0x[0-9a-fA-F]+$"),
    (_FLOAT, r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
):
    _NumberLoader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789."))


def _construct_int(loader: _NumberLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_NumberLoader.add_constructor(_INT, _construct_int)


def parse_yaml(text: str, where: str) -> Any:
    """YAML to Python values. Raises `UserError` naming `where` and the line."""
    try:
        loader = _NumberLoader(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None
    loader.name = where
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _LARGEST_YAML:
            raise UserError(f"{where}: holds more than {_LARGEST_YAML} values; is this a run's file?")
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deep, or an alias inside itself") from None
    except UserError:
        raise
    except ValueError as error:  # a number of thousands of digits, a 30th of February
        raise UserError(f"{where}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values `node` unfolds to: a few hundred bytes of aliases can stand for gigabytes."""
    if id(node) not in known:
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_size(child, known) for child in flat)
    return known[id(node)]


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
        if not is_finite(value):
            raise UserError(f"{where}: {key}: {_shown(value)} is not a finite number")
    # 1e5 is a float to YAML and JSON, a count to a person; a float field takes the integer as well.
    values = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in values.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, item) for item in error.errors()]
        raise UserError(f"{where}: " + "\n  ".join(problems)) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _explain(model: type[BaseModel], item: ErrorDetails) -> str:
    key = ".".join(str(part) for part in item["loc"] if not isinstance(part, int)) or ""
    if item["type"] == "extra_forbidden":
        last = str(item["loc"][-1])
        return f"unknown key '{key}'{nearest(last, list(_part(model, item['loc'][:-1]).model_fields))}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message.startswith("Input ") else message
    got = f" (got {_shown(item['input'])})" if key else ""
    return f"{key}: {message}{got}" if key else message


def _part(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that stands at `path` inside `model`, such as that of `rope_scaling`."""
    for name in path:
        field = model.model_fields.get(str(name))
        inner = [kind for kind in get_args(field.annotation) if _is_model(kind)] if field else []
        model = inner[0] if inner else model
    return model


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
