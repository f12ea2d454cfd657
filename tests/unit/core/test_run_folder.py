"""Protects: which version a launch continues, and that a new one never overwrites an old one."""

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


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x", "-rf", "a b", "$(x)"])
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
