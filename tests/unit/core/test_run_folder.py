"""Protects: which version a launch continues, and that a new one never overwrites an old one."""

import os
from pathlib import Path

import pytest

from aquila.core import run_folder
from aquila.core.errors import UserError


def make_version(folder: Path, name: str, checkpoint: bool) -> None:
    (folder / name).mkdir(parents=True)
    if checkpoint:
        step = folder / name / "checkpoints" / "step-00000010"
        step.mkdir(parents=True)


def test_auto_continues_the_newest_version_with_a_checkpoint(tmp_path: Path) -> None:
    make_version(tmp_path, "2026010109", checkpoint=True)
    make_version(tmp_path, "2026010110", checkpoint=True)
    make_version(tmp_path, "2026010110-2", checkpoint=True)
    make_version(tmp_path, "2026010110-10", checkpoint=True)
    make_version(tmp_path, "2026010111", checkpoint=False)
    assert run_folder.choose_version(tmp_path, "auto") == ("2026010110-10", True)


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    make_version(tmp_path, "2026010109", checkpoint=False)
    (tmp_path / "2026010109" / "checkpoints" / ".step-00000010.partial").mkdir(parents=True)
    assert run_folder.choose_version(tmp_path, "auto")[1] is False


@pytest.mark.parametrize("latest", [None, "", "step-00000099", "\udcff"])
def test_a_lost_or_wrong_latest_changes_nothing(tmp_path: Path, latest: str | None) -> None:
    make_version(tmp_path, "2026010109", checkpoint=True)
    if latest is not None:
        path = tmp_path / "2026010109" / "checkpoints" / "latest"
        path.write_bytes(latest.encode("utf-8", "surrogateescape"))
    assert run_folder.choose_version(tmp_path, "auto") == ("2026010109", True)


def test_never_takes_a_new_version_with_a_number_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "2026010110")
    assert run_folder.choose_version(tmp_path, "never") == ("2026010110", False)
    make_version(tmp_path, "2026010110", checkpoint=True)
    assert run_folder.choose_version(tmp_path, "never") == ("2026010110-2", False)
    make_version(tmp_path, "2026010110-2", checkpoint=True)
    assert run_folder.choose_version(tmp_path, "never") == ("2026010110-3", False)


@pytest.mark.parametrize("hour", ["2026010109", "2025010109"])
def test_names_only_grow_when_the_clock_goes_back(tmp_path: Path, monkeypatch, hour: str) -> None:
    """An hour of another zone, or of a clock that was wrong, names no version before the newest."""
    make_version(tmp_path, "2026010110", checkpoint=True)
    make_version(tmp_path, "2026010110-2", checkpoint=False)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: hour)
    assert run_folder.choose_version(tmp_path, "never") == ("2026010110-3", False)
    make_version(tmp_path, "2026010110-3", checkpoint=True)
    assert run_folder.choose_version(tmp_path, "auto") == ("2026010110-3", True)


def test_the_newest_launch_is_told_by_its_number(tmp_path: Path) -> None:
    for name, content in {"2026010110": {"launch": 2}, "2026010111": {"launch": 1}, "2026010112": []}.items():
        make_version(tmp_path, name, checkpoint=False)
        run_folder.write_json(tmp_path / name / run_folder.STATUS, content)
    assert run_folder.newest_launch(tmp_path).name == "2026010110"
    assert run_folder.launch_number(tmp_path) == 3
    assert run_folder.newest_launch(tmp_path / "none") is None


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "/tmp/x", "-rf", "a b", "$(x)", "../evil", "a\n", "n" * 240]
)
def test_an_experiment_is_a_folder_s_name(name: str) -> None:
    with pytest.raises(UserError):
        run_folder.check_experiment(name)


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    run_folder.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run_folder.write_json(path, {"a": object()})
    assert run_folder.read_json(path) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_the_first_thing_that_cannot_be_written_is_found(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "2026010100"
    for name in ("metrics.jsonl", "logs/h-rank-0000.log", "checkpoints/step-00000001/state.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    assert run_folder.first_unwritable(run) is None
    assert run_folder.first_unwritable(tmp_path / "none") is None
    real = os.access

    def foreign(name: str):
        return lambda path, mode, **more: Path(path).name != name and real(path, mode, **more)

    for name in ("metrics.jsonl", "logs", "h-rank-0000.log", "checkpoints", "2026010100"):
        monkeypatch.setattr(os, "access", foreign(name))
        assert run_folder.first_unwritable(run).name == name
    monkeypatch.setattr(os, "access", foreign("state.json"))  # a saved checkpoint is never written again
    assert run_folder.first_unwritable(run) is None
