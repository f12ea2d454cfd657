"""Protects: a rank that reads another configuration than the launcher checked says which key, and stops."""

import json
from pathlib import Path

import pytest

from aquila.config import load_run_config
from aquila.config.compare import check_function, check_launched, settings_of
from aquila.core.errors import UserError
from aquila.core.variables import LAUNCHED_CONFIG


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "checkpoints_in" / "m").mkdir(parents=True)
    (tmp_path / "checkpoints_in" / "m" / "config.json").write_text('{"dim": 64, "n_heads": 4, "n_layers": 2}')
    (tmp_path / "run.yaml").write_text("lr: 0.001\nbetas: [0.9, 0.95]\n")
    (tmp_path / "deepspeed.json").write_text('{"zero_optimization": {"stage": 1}}')
    launched = settings_of(load_run_config("run.yaml", "m", [], root=tmp_path))
    monkeypatch.setenv(LAUNCHED_CONFIG, json.dumps(launched))
    return tmp_path


def check(project: Path) -> None:
    check_launched(load_run_config("run.yaml", "m", [], root=project))


def test_the_same_files_agree(project: Path) -> None:
    check(project)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("run.yaml", "lr: 0.002\nbetas: [0.9, 0.95]\n", "lr was 0.001 for the launcher and is 0.002 here"),
        ("checkpoints_in/m/config.json", '{"dim": 64, "n_heads": 4, "n_layers": 3}', "config.json: n_layers"),
        ("deepspeed.json", '{"zero_optimization": {"stage": 2}}', "zero_stage"),
        (
            "deepspeed.json",
            '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}',
            "deepspeed.json: ",
        ),
    ],
)
def test_a_difference_is_named(project: Path, file: str, text: str, told: str) -> None:
    (project / file).write_text(text)
    with pytest.raises(UserError, match="another configuration") as caught:
        check(project)
    assert told in str(caught.value)


def test_other_launchers_tell_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHED_CONFIG)
    (project / "run.yaml").write_text("lr: 0.002\n")
    check(project)


SCALED = '{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}'


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('"rope_theta": 5e5', "rope_theta 10000.0 -> 500000.0"),
        ('"norm_eps": 1e-6', "norm_eps 1e-05 -> 1e-06"),
        ('"n_kv_heads": 2', "n_kv_heads 4 -> 2"),
        (f'"rope_scaling": {SCALED}', "rope_scaling None -> {'rope_type': 'yarn', 'factor': 2.0,"),
    ],
)
def test_a_checkpoint_that_computed_something_else_is_named(project: Path, change: str, told: str) -> None:
    here = project / "checkpoints_in" / "m" / "config.json"
    checkpoint = project / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(here.read_text())
    here.write_text(f'{{"dim": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 4096, {change}}}')
    key = told.split(" ")[0]
    with pytest.raises(UserError, match=rf"add allow_model_changes=\[{key}\]") as caught:
        check_function(checkpoint, load_run_config("run.yaml", "m", [], root=project))
    assert told in str(caught.value)
    other = load_run_config("run.yaml", "m", ["allow_model_changes=[n_heads]"], root=project)
    with pytest.raises(UserError, match=key):
        check_function(checkpoint, other)
    allowed = load_run_config("run.yaml", "m", [f"allow_model_changes=[{key}]"], root=project)
    (line,) = check_function(checkpoint, allowed)
    assert told in line


def test_keys_that_change_nothing_may_differ(project: Path) -> None:
    checkpoint = project / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(
        '{"dim": 64, "n_heads": 4, "n_layers": 2, "n_kv_heads": 4, "max_seq_len": 4096, "flash_atten": true}'
    )
    assert check_function(checkpoint, load_run_config("run.yaml", "m", [], root=project)) == []
