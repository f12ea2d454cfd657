"""Which model is taken when none, a run or a name is given."""

import json
import os
import subprocess
import sys

import pytest

from aquila.core.checkpoints import fingerprint
from aquila.core.errors import UserError
from aquila.generation.locate import resolve_checkpoint
from aquila.model.weights import resolve_model_dir
from aquila.training.resume import find_resume


def checkpoint(root, run, step, when=None):
    folder = root / "checkpoints_out" / run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "state.json").write_text("{}")
    manifest = {path.name: fingerprint(path) for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if when is not None:
        os.utime(folder, (when, when))
    return folder


def test_newest_run_wins_with_its_highest_step(tmp_path):
    checkpoint(tmp_path, "a/v1", 900, when=1000)
    checkpoint(tmp_path, "b/v2", 10, when=2000)
    expected = checkpoint(tmp_path, "b/v2", 20, when=3000)
    assert resolve_checkpoint(None, tmp_path) == expected


@pytest.mark.parametrize("latest", ["", "step-00000099", "../../../elsewhere"])
def test_what_the_file_latest_says_does_not_matter(tmp_path, latest):
    checkpoint(tmp_path, "a/v1", 5)
    expected = checkpoint(tmp_path, "a/v1", 7)
    (expected.parent / "latest").write_text(latest)
    assert resolve_checkpoint(None, tmp_path) == expected


def test_a_flipped_bit_leads_to_the_checkpoint_before_as_in_training(tmp_path, capsys):
    whole = checkpoint(tmp_path, "a/v1", 5)
    damaged = checkpoint(tmp_path, "a/v1", 7)
    (damaged / "model.safetensors").write_bytes(b"weighus")
    run = damaged.parents[1]
    assert resolve_checkpoint(None, tmp_path) == whole
    assert str(damaged) in capsys.readouterr().err
    assert find_resume(run, "auto") == whole
    assert resolve_model_dir(run) == whole


def test_a_run_its_checkpoints_and_a_name_are_understood(tmp_path):
    folder = checkpoint(tmp_path, "a/v1", 5)
    assert resolve_checkpoint(str(folder), tmp_path) == folder
    assert resolve_checkpoint(str(folder.parent), tmp_path) == folder
    assert resolve_checkpoint(str(folder.parent.parent), tmp_path) == folder
    named = tmp_path / "checkpoints_in" / "mine"
    named.mkdir(parents=True)
    (named / "config.json").write_text("{}")
    (named / "pytorch_model.bin").write_bytes(b"")
    assert resolve_checkpoint("mine", tmp_path) == named


def test_an_experiment_means_its_newest_run(tmp_path):
    checkpoint(tmp_path, "exp/v1", 5, when=1000)
    newest = checkpoint(tmp_path, "exp/v2", 3, when=2000)
    checkpoint(tmp_path, "other/v1", 9, when=3000)
    assert resolve_checkpoint(str(newest.parents[2]), tmp_path) == newest


def test_no_model_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match=r"quickstart\.sh.*checkpoints_in"):
        resolve_checkpoint(None, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        resolve_checkpoint(str(tmp_path / "no"), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        resolve_checkpoint(str(tmp_path), tmp_path)


def test_finding_needs_no_torch():
    code = "import sys, aquila.generation.locate, generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
