"""The house and its floors: imports point only downward, never between wings, never past a door."""

import ast
from pathlib import Path

import pytest

FLOORS = {
    "aquila.core": 0,
    "aquila.config": 1,
    "aquila.tokenizer": 1,
    "aquila.backend": 1,
    "aquila.model": 2,
    "aquila.data": 2,
    "aquila.training": 3,
    "aquila.generation": 3,
    "aquila.launch": 3,
    "aquila.planning": 3,
    "aquila.acceptance": 4,
    "aquila.preflight": 4,
    "aquila.accept": 5,
    "aquila.pretrain": 5,
    "aquila.evaluate": 5,
    "aquila.convert": 5,
    "aquila.average": 5,
    "aquila.plan": 5,
    "aquila.report": 5,
    "data_tools": 5,
    "generate": 5,
}
COMMANDS = 5
"""The top floor, and where `__main__.py` of a room stands: it connects rooms."""
EVERYONES = {"aquila.core", "aquila.config"}
"""Rooms of the ground floor that any room may use."""
DOORS = {
    "deepspeed": "aquila/training/deepspeed/",
}
"""A library -> the only file or folder that may import it."""
NO_TORCH = (
    "aquila/core/",
    "aquila/config/",
    "aquila/tokenizer/",
    "aquila/launch/",
    "aquila/preflight/",
    "aquila/planning/",
)
TORCH = {"torch", "deepspeed", "transformers"}


def room_of(module: str) -> str | None:
    """The room that a dotted module name lies in; None for what is not ours."""
    parts = module.split(".")
    if parts[0] != "aquila":
        return parts[0] if parts[0] in FLOORS else None
    return ".".join(parts[:2]) if len(parts) > 1 and not parts[1].startswith("__") else None


def imports_of(source: str, package: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in `source`, in functions and under `if` too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]).rstrip(".")
            # `from aquila import model` names the room in what is imported.
            found += [(node.lineno, f"{base}.{a.name}" if base == "aquila" else base) for a in node.names]
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """One line for each import in `sources` (path -> text) that breaks a rule."""
    problems = []
    for path, source in sources.items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        here = room_of(module)
        floor = COMMANDS if module.endswith("__main__") else FLOORS.get(here or "", COMMANDS)
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for line, imported in imports_of(source, package):
            where = f"{path}:{line} imports {imported}"
            library = imported.split(".")[0]
            if library in DOORS and not path.startswith(DOORS[library]):
                problems.append(f"{where}, which only {DOORS[library]} may")
            if library in TORCH and path.startswith(NO_TORCH):
                problems.append(f"{where}; this room works without torch")
            there = room_of(imported)
            if (
                here is None
                or there is None
                or there == here
                or (there in EVERYONES and FLOORS[there] < floor)
            ):
                continue
            if there not in FLOORS:
                problems.append(f"{where}, which has no floor in this test")
            elif FLOORS[there] > floor:
                problems.append(f"{where}, which is a floor above")
            elif FLOORS[there] == floor and floor < COMMANDS:
                problems.append(f"{where}, which is beside it on floor {floor}")
    return problems


def sources_of(root: Path) -> dict[str, str]:
    files = [*(root / "aquila").rglob("*.py"), *(root / "data_tools").rglob("*.py"), root / "generate.py"]
    return {str(f.relative_to(root)): f.read_text(encoding="utf-8") for f in files if f.is_file()}


def test_imports_point_downward(root: Path) -> None:
    sources = sources_of(root)
    assert len(sources) > 20
    assert violations(sources) == []


def test_every_room_has_a_floor(root: Path) -> None:
    rooms = {room_of(path.removesuffix(".py").replace("/", ".")) for path in sources_of(root)} - {None}
    assert rooms <= set(FLOORS)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("aquila/model/aquila.py", "from aquila.training.deepspeed.engine import Engine", "a floor above"),
        ("aquila/model/aquila.py", "from ..training import engine", "a floor above"),
        ("aquila/model/aquila.py", "def f():\n    import aquila.generation", "a floor above"),
        ("aquila/model/aquila.py", "from aquila import training", "a floor above"),
        ("aquila/model/loss.py", "from aquila.data.sampler import micro_batch_indices", "beside it"),
        ("aquila/training/trainer.py", "import aquila.launch.hostfile", "beside it"),
        ("aquila/backend/cpu.py", "import aquila.model", "a floor above"),
        ("aquila/training/trainer.py", "import deepspeed", "only aquila/training/deepspeed/"),
        ("aquila/launch/nodes.py", "import torch", "without torch"),
        ("aquila/planning/memory.py", "import torch", "without torch"),
        ("aquila/launch/agent.py", "from aquila.preflight import local", "a floor above"),
        ("aquila/planning/memory.py", "import aquila.training.schedule", "beside it"),
        ("aquila/core/jsonl.py", "from aquila.config import RunConfig", "a floor above"),
        ("aquila/config/run.py", "from torch import nn", "without torch"),
        ("aquila/model/aquila.py", "import aquila.unheard_of", "no floor"),
    ],
)
def test_each_rule_is_kept(root: Path, path: str, source: str, message: str) -> None:
    """The real sources with one import turned the wrong way fail."""
    turned = sources_of(root) | {path: source}
    found = violations(turned)
    assert len(found) == 1
    assert message in found[0]


def test_what_the_rules_allow(root: Path) -> None:
    allowed = {
        "aquila/training/deepspeed/engine.py": "import deepspeed\nfrom aquila.model import AquilaModel",
        "aquila/backend/cpu.py": "from aquila.core.errors import UserError\nfrom aquila.backend import fp8",
        "aquila/preflight/hosts.py": "from aquila.launch.cluster import Cluster\nimport aquila.planning",
        "aquila/launch/__main__.py": "from aquila.preflight.local import check_run",
        "aquila/pretrain.py": "from aquila.training.deepspeed.engine import Engine\nimport aquila.data",
    }
    assert violations(allowed) == []
