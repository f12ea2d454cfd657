"""Device names stand in `aquila/backend/` alone; everything else asks it."""

import ast
import re
from pathlib import Path

NAME = re.compile(r"(cuda|npu|nccl|hccl)(:\d+)?")
ATTRIBUTES = {"cuda", "npu"}
MODULES = {"torch_npu"}


def device_names(source: str) -> list[tuple[int, str]]:
    """(line, what) of every device name in code: a string, `torch.cuda`, `.npu()`, `import torch_npu`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            found.append((node.lineno, node.value))
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            found.append((node.lineno, f".{node.attr}"))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [(node.lineno, name) for name in modules if name.split(".")[0] in MODULES]
    return found


def test_no_device_name_outside_of_the_backends(root: Path):
    files = [*(root / "aquila").rglob("*.py"), *(root / "data_tools").glob("*.py"), root / "generate.py"]
    outside = [f for f in files if f.is_file() and root / "aquila" / "backend" not in f.parents]
    assert len(outside) > 10
    found = {str(f.relative_to(root)): device_names(f.read_text(encoding="utf-8")) for f in outside}
    assert {name: places for name, places in found.items() if places} == {}


def test_the_search_finds_what_it_looks_for():
    source = 'import torch_npu\nx.to("cuda:0")\ntorch.cuda.synchronize()\nname = "nccl"\n"""On cuda, too."""'
    assert sorted(line for line, _ in device_names(source)) == [1, 2, 3, 4]
