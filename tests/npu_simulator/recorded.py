"""What a simulated run has launched, read back from the folder AQUILA_SIMULATED_RECORD."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def operators(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(operator, its record) of every process."""
    for file in sorted(folder.glob("*.json")):
        yield from json.loads(file.read_text()).items()


def counts(folder: Path) -> Counter[str]:
    """How often each operator was launched, over all processes."""
    found: Counter[str] = Counter()
    for name, record in operators(folder):
        found[name] += record["count"]
    return found


def calls(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each distinct call of torch_npu's own operators: its name and arguments; tensors without memory."""
    for name, record in operators(folder):
        for call in record["calls"]:
            yield name.removeprefix("npu::"), json.loads(call, object_hook=_tensor)


def _tensor(found: dict[str, Any]) -> Any:
    if found.keys() != {"shape", "stride", "dtype"}:
        return found
    dtype = getattr(torch, found["dtype"])
    return torch.empty_strided(found["shape"], found["stride"], dtype=dtype, device="meta")
