"""Protects: nodes whose sources differ are told apart, C++ and tables included."""

from pathlib import Path

import pytest

from aquila.core.paths import source_hash


@pytest.mark.parametrize("name", ["a.py", "kernels/b.cpp", "kernels/c.h", "table.txt"])
def test_every_source_counts(tmp_path: Path, name: str) -> None:
    for file in ("a.py", "kernels/b.cpp", "kernels/c.h", "table.txt"):
        path = tmp_path / "aquila" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    before = source_hash(tmp_path)
    (tmp_path / "aquila" / name).write_text("2")
    assert source_hash(tmp_path) != before


def test_what_compilers_leave_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "aquila").mkdir()
    before = source_hash(tmp_path)
    (tmp_path / "aquila" / "a.cpython-311.pyc").write_bytes(b"1")
    assert source_hash(tmp_path) == before
