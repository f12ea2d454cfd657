"""The table of what is taken from DeepSpeed beyond its public interface is that of the installed release."""

import hashlib
import importlib
import inspect
import re

import deepspeed
import pytest

from aquila.training.deepspeed.patches import CHECKED, PATCHES, why_not_blockwise

ENTRIES = [(of, patch) for of, patches in PATCHES.items() for patch in patches]


@pytest.mark.skipif(deepspeed.__version__.partition("+")[0] not in CHECKED, reason="another DeepSpeed")
@pytest.mark.parametrize(("of", "patch"), ENTRIES, ids=[patch.where for _, patch in ENTRIES])
def test_the_source_is_the_one_that_was_read(root, of, patch):
    module, name = of.split(":")
    source = inspect.getsource(getattr(getattr(importlib.import_module(module), name), patch.where))
    assert hashlib.sha256(source.encode()).hexdigest()[:12] == patch.source, source
    assert (root / patch.guard).is_file()


def test_a_release_that_nobody_read_keeps_its_own_step():
    assert why_not_blockwise("0.19.8") is None
    assert why_not_blockwise("0.19.8+cpu") is None
    assert why_not_blockwise("0.19.9") == "DeepSpeed 0.19.9 was not checked, only 0.19.8"


def test_private_names_stand_in_the_table_alone(root):
    """A private method of DeepSpeed's optimizer or engine that the package uses is an entry."""
    used = set()
    for path in (root / "aquila/training/deepspeed").glob("*.py"):
        if path.name != "patches.py":
            used |= set(re.findall(r"(?:zero|_engine|DeepSpeedEngine)\.(_[a-z]\w+)", path.read_text()))
    assert used - {"_global_grad_norm", "_engine"} == {
        patch.where
        for _, patch in ENTRIES
        if patch.where.startswith("_") and not patch.why.startswith("read: ")
    }
