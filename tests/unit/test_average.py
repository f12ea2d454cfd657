"""The mean of checkpoints is the mean, its record says of what, and its loss stands beside its members'."""

import json
import shutil

import pytest
import torch

from aquila.average import find_members, main
from aquila.core.checkpoints import fingerprint
from aquila.core.errors import UserError
from aquila.evaluate import main as evaluate_main
from aquila.model import AquilaModel, save_weights
from aquila.model.average import ema_shares
from tests.unit.generation.models import write_model_dir


@pytest.fixture
def members(tmp_path, root):
    """Three checkpoints of a run, with weights drawn from different seeds."""
    folders = []
    for step in (2, 4, 6):
        folder = tmp_path / "exp" / "2026010100" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_model_dir(folder, root, max_seq_len=64)
        model = AquilaModel.from_pretrained(folder)
        model.init_weights(step)
        save_weights(model, folder)
        (folder / "state.json").write_text(json.dumps({"step": step}))
        files = [path for path in folder.iterdir() if path.is_file()]
        (folder / "manifest.json").write_text(json.dumps({path.name: fingerprint(path) for path in files}))
        folders.append(folder)
    return folders


def weights(folder):
    return dict(AquilaModel.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("ema", [None, 0.6])
def test_the_average_is_computed_by_hand(members, tmp_path, ema) -> None:
    words = [str(member) for member in members] + ["--output", str(tmp_path / "out")]
    assert main(words + (["--ema", str(ema)] if ema else [])) == 0
    found, parts = weights(tmp_path / "out"), [weights(member) for member in members]
    for name, value in found.items():
        if ema:
            wanted = parts[0][name].double()
            for part in parts[1:]:
                wanted = ema * wanted + (1 - ema) * part[name].double()
        else:
            wanted = sum(part[name].double() for part in parts) / 3
        assert torch.allclose(value.double(), wanted, atol=1e-7)
    record = json.loads((tmp_path / "out" / "average.json").read_text())
    assert [member["path"] for member in record["members"]] == [str(member) for member in members]
    assert sum(ema_shares(5, 0.3)) == pytest.approx(1)


def test_a_run_s_last_checkpoints_and_their_losses(members, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text("Monday is the day after Sunday. " * 5)
    out, data = tmp_path / "out", str(tmp_path / "text.txt")
    assert main([str(tmp_path / "exp"), "--last", "2", "--output", str(out), "--data", data]) == 0
    shown = capsys.readouterr().out
    record = json.loads((out / "average.json").read_text())
    assert [member["share"] for member in record["members"]] == [0.5, 0.5]
    assert f"loss {record['loss']:.6f}" in shown
    for folder, loss in ((out, record["loss"]), (members[1], record["members"][0]["loss"])):
        monkeypatch.setattr("sys.argv", ["evaluate", "--model-dir", str(folder), "--data", data, "--json"])
        evaluate_main()
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(loss, abs=1e-9)


def test_what_cannot_be_averaged_is_refused_and_nothing_written(members, tmp_path, root) -> None:
    first, second, _ = map(str, members)
    other = write_model_dir(tmp_path / "other", root, dim=96)
    turned = tmp_path / "turned"
    shutil.copytree(members[0], turned)
    config = json.loads((turned / "config.json").read_text())
    (turned / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    (turned / "manifest.json").unlink()
    out = ["--output", str(tmp_path / "out")]
    for words, message in (
        ([first], "two members or more"),
        ([first, first], "each given once"),
        ([first, second, "--ema", "1"], "between 0 and 1"),
        ([first, second, "--last", "2"], "--last N takes one run"),
        ([first, "--last", "9"], "holds 3 checkpoints of a run, not 9"),
        ([first, str(other)], "is another model than"),
        ([first, str(turned)], "is another model than"),
        ([first, str(tmp_path / "absent")], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            main([*words, *out])
    (members[1] / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json"):
        find_members([first, second], None)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        main([first, str(members[2]), *out])
