"""Which checkpoint a run goes on from, and what becomes of those that it does not."""

import json
from pathlib import Path

import pytest

from aquila.core.checkpoints import fingerprint
from aquila.training.resume import find_resume, launch_id


@pytest.fixture(autouse=True)
def no_launch(monkeypatch) -> None:
    for name in ("AQUILA_LAUNCH_MARK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def checkpoint(run: Path, step: int, launch: str | None = None) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "launch": launch}))
    (folder / "manifest.json").write_text(json.dumps({"state.json": fingerprint(folder / "state.json")}))
    (run / "checkpoints" / "latest").write_text(folder.name + "\n")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_going_back_sets_aside_what_came_after(tmp_path: Path, capsys) -> None:
    """Otherwise the next start would go on from the path that was left."""
    first, second, third = (checkpoint(tmp_path, step) for step in (4, 8, 12))
    assert find_resume(tmp_path, str(first)) == first
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000004", "superseded-1"]
    assert names(tmp_path / "checkpoints" / "superseded-1") == [second.name, third.name]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004\n"
    assert "2 checkpoints that this run does not go on from are set aside" in capsys.readouterr().out
    assert find_resume(tmp_path, "auto") == first
    newer = checkpoint(tmp_path, 8)
    assert find_resume(tmp_path, str(first)) == first  # and once more
    assert names(tmp_path / "checkpoints" / "superseded-2") == [newer.name]


def test_starting_anew_or_from_another_run_sets_all_aside(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (4, 8):
        checkpoint(run, step)
    source = checkpoint(other, 6)
    assert find_resume(run, str(source)) == source
    assert names(run / "checkpoints") == ["superseded-1"]
    checkpoint(run, 8)
    assert find_resume(run, "never") is None
    assert names(run / "checkpoints") == ["superseded-1", "superseded-2"]
    assert names(other / "checkpoints") == ["latest", "step-00000006"]


@pytest.mark.parametrize("resume", ["never", "a path"])
def test_a_restart_goes_on_from_what_its_launch_has_saved(tmp_path: Path, monkeypatch, resume: str) -> None:
    run, source = tmp_path / "run", checkpoint(tmp_path / "other", 6)
    resume = resume if resume == "never" else str(source)
    monkeypatch.setenv("AQUILA_LAUNCH_MARK", "abc-0")
    assert launch_id() == "abc"
    checkpoint(run, 10, "before")
    assert find_resume(run, resume) == (None if resume == "never" else source)
    ours = checkpoint(run, 8, "abc")
    monkeypatch.setenv("AQUILA_LAUNCH_MARK", "abc-3")  # rank 0 may be on another node now
    assert find_resume(run, resume) == ours
    monkeypatch.setenv("AQUILA_LAUNCH_MARK", "def-0")  # the same command, given again
    assert find_resume(run, resume) != ours


def test_torchruns_own_restart_does_so_too(tmp_path: Path, monkeypatch) -> None:
    ours = checkpoint(tmp_path, 8)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_resume(tmp_path, "never") == ours


def test_what_killed_processes_left_is_cleared(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 4)
    for left in (".step-00000013.partial", ".step-00000004.universal", ".step-00000002.old"):
        (tmp_path / "checkpoints" / left / "deepspeed").mkdir(parents=True)
    assert find_resume(tmp_path, "auto") == whole
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000004"]
