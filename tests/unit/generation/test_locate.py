"""Which model is taken when none, a run or a name is given."""

import os
import subprocess
import sys

import pytest

from aquila.core.errors import UserError
from aquila.generation.locate import find_model_dir


def checkpoint(root, run, step, when=None, latest=True):
    folder = root / "checkpoints_out" / run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    if latest:
        (folder.parent / "latest").write_text(folder.name + "\n")
    if when is not None:
        os.utime(folder, (when, when))
    return folder


def test_newest_run_wins_and_latest_names_its_checkpoint(tmp_path):
    checkpoint(tmp_path, "a/v1", 900, when=1000)
    expected = checkpoint(tmp_path, "b/v2", 10, when=2000)
    checkpoint(tmp_path, "b/v2", 20, when=3000, latest=False)
    assert find_model_dir(None, tmp_path) == expected


def test_without_a_good_latest_the_highest_whole_step_is_taken(tmp_path):
    first = checkpoint(tmp_path, "a/v1", 5)
    (checkpoint(tmp_path, "a/v1", 7) / "model.safetensors").unlink()
    assert find_model_dir(None, tmp_path) == first


def test_latest_cannot_lead_elsewhere(tmp_path):
    inside = checkpoint(tmp_path, "a/v1", 5)
    outside = checkpoint(tmp_path / "other", "x/y", 1)
    (inside.parent / "latest").write_text(str(outside))
    assert find_model_dir(None, tmp_path) == inside


def test_a_run_its_checkpoints_and_a_name_are_understood(tmp_path):
    folder = checkpoint(tmp_path, "a/v1", 5)
    assert find_model_dir(str(folder), tmp_path) == folder
    assert find_model_dir(str(folder.parent), tmp_path) == folder
    assert find_model_dir(str(folder.parent.parent), tmp_path) == folder
    named = tmp_path / "checkpoints_in" / "mine"
    named.mkdir(parents=True)
    (named / "config.json").write_text("{}")
    (named / "pytorch_model.bin").write_bytes(b"")
    assert find_model_dir("mine", tmp_path) == named


def test_an_experiment_means_its_newest_run(tmp_path):
    checkpoint(tmp_path, "exp/v1", 5, when=1000)
    newest = checkpoint(tmp_path, "exp/v2", 3, when=2000)
    checkpoint(tmp_path, "other/v1", 9, when=3000)
    assert find_model_dir(str(newest.parents[2]), tmp_path) == newest


def test_no_model_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match=r"quickstart\.sh.*checkpoints_in"):
        find_model_dir(None, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        find_model_dir(str(tmp_path / "no"), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        find_model_dir(str(tmp_path), tmp_path)


def test_finding_needs_no_torch():
    code = "import sys, aquila.generation.locate, generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
