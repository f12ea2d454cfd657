"""Protects: metrics are read line by line, a half-written line once it is whole."""

from pathlib import Path

from aquila.core.jsonl import JsonlTail


def test_only_new_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    follower = JsonlTail(path)
    assert follower.new_lines() == []
    with path.open("a") as file:
        file.write('{"step": 2}\n{"st')
        file.flush()
        assert follower.new_lines() == [{"step": 2}]
        file.write('ep": 3}\nnot json\n')
    assert follower.new_lines() == [{"step": 3}]


def test_a_file_that_comes_later_and_one_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = JsonlTail(path)
    assert follower.new_lines() == []
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert len(follower.new_lines()) == 2
    path.write_text('{"step": 1}\n')  # cut back
    assert follower.new_lines() == []
    path.write_text('{"step": 1}\n{"step": 2, "again": true}\n')
    assert follower.new_lines() == [{"step": 2, "again": True}]
