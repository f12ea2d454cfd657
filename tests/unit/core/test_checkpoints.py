"""What is a whole checkpoint and what is not."""

import json
from pathlib import Path

import pytest

from aquila.core.checkpoints import find_corruption, fingerprint, list_checkpoints
from aquila.core.errors import UserError
from aquila.training.resume import find_resume


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (folder / "deepspeed" / "shard.pt").write_bytes(b"x" * 1000)
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifest = {str(path.relative_to(folder)): fingerprint(path) for path in files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "deepspeed/shard.pt", "manifest.json"])
@pytest.mark.parametrize("fault", ["missing", "cut short", "flipped bit", "longer"])
def test_every_fault_in_every_file_is_found_and_the_one_before_is_used(
    tmp_path: Path, name: str, fault: str, capsys
) -> None:
    whole, newest = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert find_corruption(newest) is None
    path = newest / name
    data = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    elif fault == "flipped bit":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-7] if fault == "cut short" else data + b"}")
    problem = find_corruption(newest)
    assert problem is not None
    assert name in problem or name == "manifest.json"
    assert find_resume(tmp_path, "auto") == whole
    assert str(newest) in capsys.readouterr().out


@pytest.mark.parametrize("text", ['"size"', '"sha256"', "{", "}", ":", "256"])
def test_a_manifest_that_is_json_but_no_manifest_is_damage(tmp_path: Path, text: str) -> None:
    manifest = checkpoint(tmp_path, 9) / "manifest.json"
    whole = manifest.read_text()
    assert text in whole
    for other in ('"qize"', "[", "0"):
        manifest.write_text(whole.replace(text, other, 1))
        assert find_corruption(manifest.parent) is not None
    manifest.write_text('{"state.json": 5}')
    assert find_corruption(manifest.parent) is not None


def test_without_a_whole_one_nothing_is_guessed(tmp_path: Path) -> None:
    assert find_resume(tmp_path, "auto") is None
    (checkpoint(tmp_path, 5) / "state.json").unlink()
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        find_resume(tmp_path, "auto")
    assert find_resume(tmp_path, "never") is None


def test_a_path_must_be_whole(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 5)
    assert find_resume(tmp_path / "elsewhere", str(folder)) == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        find_resume(tmp_path, str(folder))
    with pytest.raises(UserError, match="does not exist"):
        find_resume(tmp_path, str(tmp_path / "nothing"))


def test_checkpoints_sort_by_step_and_partial_ones_do_not_count(tmp_path: Path) -> None:
    for name in ("step-00000009", "step-00000010", "step-100000000", ".step-00000011.partial", "step-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000009",
        "step-00000010",
        "step-100000000",
    ]
