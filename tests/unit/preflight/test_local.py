"""Protects: every mistake that can be known beforehand is found, all at once, and nothing is created."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from aquila.backend import detect
from aquila.config import load_model_config
from aquila.core.errors import UserError
from aquila.data.indexfile import bin_path, idx_path, write_index
from aquila.data.meta import make_meta, meta_path, tokenizer_facts, write_meta
from aquila.launch.device_probe import probe_devices
from aquila.model import AquilaModel
from aquila.model.weights import save_weights
from aquila.preflight import local
from aquila.preflight.local import FAIL, PASS, WARN, PreflightReport, check_run
from aquila.tokenizer import Tokenizer, load_tokenizer

CONFIG = "batch_size: 2\nlr: 1.0e-4\ndata_prefix: data/demo_text_document\n"
MODEL = {"dim": 32, "n_layers": 1, "n_heads": 2, "multiple_of": 8, "vocab_size": 4096, "max_seq_len": 64}


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's own answer is tested once, below; here only what follows from it.
    facts = {"device": "cpu", "count": 2, "name": "test", "precisions": ["bf16", "fp32"], "memory": 2**34}
    facts["fp8"] = "torchao is not installed; install it"
    monkeypatch.setattr(local, "probe_devices", lambda: facts)


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Path:
    """A folder with everything in order."""
    tokenizer_dir = root / "checkpoints_in" / "aquila-tiny"
    model = tmp_path / "checkpoints_in" / "tiny"
    model.mkdir(parents=True)
    for path in tokenizer_dir.glob("*"):
        if path.name != "config.json" and path.suffix in (".json", ".txt"):
            (model / path.name).write_bytes(path.read_bytes())
    tokenizer = load_tokenizer(model)
    (model / "config.json").write_text(json.dumps({**MODEL, "vocab_size": tokenizer.vocab_size}))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text(CONFIG)
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    write_dataset(tmp_path / "data" / "demo_text_document", tokenizer, np.arange(1, 400, dtype=np.int32))
    return tmp_path


def write_dataset(prefix: Path, tokenizer: Tokenizer, ids: np.ndarray) -> None:
    prefix.parent.mkdir(exist_ok=True)
    bin_path(prefix).write_bytes(ids.astype("<i4").tobytes())
    with idx_path(prefix).open("wb") as file:
        write_index(file, np.array([len(ids)], np.int32))
    counts = {"documents": 1, "tokens": len(ids), "min_id": int(ids.min()), "max_id": int(ids.max())}
    write_meta(meta_path(prefix), make_meta(tokenizer_facts(tokenizer), counts, []))


def check(
    project: Path,
    *overrides: str,
    model: str = "tiny",
    config: str = "run.yaml",
    experiment: str | None = None,
) -> PreflightReport:
    return check_run(
        project / "hostfile", config, model, list(overrides), local=True, root=project, experiment=experiment
    )


def refused(project: Path, *overrides: str, **more: str) -> str:
    """The words of the one failure; and nothing was created."""
    before = sorted(project.rglob("*"))
    checked = check(project, *overrides, **more)
    assert sorted(project.rglob("*")) == before
    assert len(checked.failures) == 1, checked.findings
    with pytest.raises(UserError) as caught:
        checked.raise_failures()
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_all_in_order(project: Path) -> None:
    checked = check(project)
    assert [finding.state for finding in checked.findings] == [PASS] * 8
    assert checked.here.host == "localhost"


def test_unknown_key_names_the_nearest(project: Path) -> None:
    (project / "configs" / "run.yaml").write_text(CONFIG + "save_intervall: 10\n")
    assert "did you mean 'save_interval'" in refused(project)
    (project / "configs" / "run.yaml").write_text(CONFIG)
    assert "did you mean 'batch_size'" in refused(project, "bach_size=3")


def test_wrong_type(project: Path) -> None:
    assert "batch_size" in refused(project, "batch_size=two")
    (project / "configs" / "run.yaml").write_text(CONFIG.replace("1.0e-4", "fast"))
    assert "lr" in refused(project)


def test_missing_config_and_model_folder(project: Path) -> None:
    assert "does not exist" in refused(project, config="absent.yaml")
    message = refused(project, model="absent")
    assert "absent does not exist" in message
    assert "tiny" in message  # what is there instead


def test_missing_weights_say_how_to_train_from_scratch(project: Path) -> None:
    assert "bmt_pre_load=False" in refused(project, "bmt_pre_load=True")
    (project / "checkpoints_in" / "tiny" / "pytorch_model.bin").touch()
    assert "is empty" in refused(project, "bmt_pre_load=True")


def test_weights_of_another_shape_are_found_in_their_headers(project: Path) -> None:
    folder = project / "checkpoints_in" / "tiny"
    save_weights(AquilaModel(load_model_config(folder)).state_dict(), folder)
    states = {finding.check: finding.state for finding in check(project, "bmt_pre_load=true").findings}
    assert states["weights"] == PASS
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dim": 64}))
    message = refused(project, "bmt_pre_load=true")
    assert "do not fit this config.json" in message
    assert "of another shape" in message


def test_a_checkpoint_that_computed_something_else(project: Path) -> None:
    """Found before a rank starts, whether the experiment is gone on with or a path is given."""
    folder = project / "checkpoints_out" / "exp" / "2026010100" / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    config = json.loads((project / "checkpoints_in" / "tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    assert "rope_theta 500000.0 -> 10000.0" in refused(project, experiment="exp")
    assert "rope_theta" in refused(project, f"resume={folder}")
    assert "is no checkpoint of a run" in refused(project, "resume=checkpoints_out/exp")
    assert not check(project, experiment="other").failures
    assert not check(project, "resume=never", experiment="exp").failures
    allowed = check(project, "allow_model_changes=[rope_theta]", experiment="exp")
    assert not allowed.failures
    assert "allow_model_changes" in next(f.detail for f in allowed.findings if f.check == "resume")
    assert "allow_model_changes" in refused(project, "allow_model_changes=[theta]")


def test_missing_data_and_data_that_is_cut_off(project: Path) -> None:
    assert "make_indexed_dataset.sh" in refused(project, "data_prefix=data/absent")
    path = bin_path(project / "data" / "demo_text_document")
    path.write_bytes(path.read_bytes()[:-4])
    assert "cut off" in refused(project)


def test_data_of_another_tokenizer(project: Path, root: Path) -> None:
    path = meta_path(project / "data" / "demo_text_document")
    meta = json.loads(path.read_text())
    meta["tokenizer"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(meta))
    assert "made with another tokenizer" in refused(project)


def test_ids_beyond_the_vocabulary(project: Path) -> None:
    tokenizer = load_tokenizer(project / "checkpoints_in" / "tiny")
    ids = np.array([1, tokenizer.vocab_size + 7], np.int32)
    write_dataset(project / "data" / "demo_text_document", tokenizer, ids)
    assert f"token id {tokenizer.vocab_size + 7}" in refused(project)
    meta_path(project / "data" / "demo_text_document").unlink()
    assert f"token id {tokenizer.vocab_size + 7}" in refused(project)


def test_a_tokenizer_larger_than_the_model_s_vocabulary(project: Path) -> None:
    (project / "checkpoints_in" / "tiny" / "config.json").write_text(json.dumps({**MODEL, "vocab_size": 300}))
    assert "vocab_size 300" in refused(project)


def test_data_without_description_is_a_warning(project: Path) -> None:
    meta_path(project / "data" / "demo_text_document").unlink()
    assert [f.check for f in check(project).findings if f.state == WARN] == ["tokenizer and data"]


def test_this_node_not_in_the_hostfile(project: Path) -> None:
    (project / "hostfile").write_text("192.0.2.200 slots=2\n")
    assert "none of its hosts" in refused(project)


def test_more_slots_than_devices(project: Path) -> None:
    (project / "hostfile").write_text("# here\nlocalhost slots=3\n")
    message = refused(project)
    assert "line 2" in message
    assert "write slots=2 or fewer" in message


def test_a_malformed_line(project: Path) -> None:
    (project / "hostfile").write_text("localhost slots=2\nnode2 slots=x\n")
    assert "line 2" in refused(project)


def test_a_model_that_does_not_fit(project: Path) -> None:
    message = refused(project, "batch_size=200000")
    assert "will not fit" in message
    assert "python -m aquila.plan tiny --devices 2 --memory 8GiB" in message


def test_float8_where_the_machine_cannot_run_it(project: Path) -> None:
    assert "fp8: tensorwise (command line): torchao is not installed" in refused(project, "fp8=tensorwise")


def test_all_failures_at_once(project: Path) -> None:
    (project / "hostfile").write_text("localhost slots=3\n")
    checked = check(project, "bmt_pre_load=True", "data_prefix=data/absent")
    failed = [finding.check for finding in checked.findings if finding.state == FAIL]
    assert failed == ["devices", "weights", "tokenizer and data"]


def test_the_machine_s_own_devices() -> None:
    facts = probe_devices()
    assert facts["count"] >= 1
    assert facts["device"] == detect()
    assert facts["precisions"]
    assert facts["fp8"]


def test_what_of_the_run_folder_cannot_be_written_is_named_with_its_owner(project: Path, monkeypatch) -> None:
    assert check(project, experiment="exp").failures == []
    log = project / "checkpoints_out" / "exp" / "2026010100" / "metrics.jsonl"
    (log.parent / "checkpoints" / "step-00000003").mkdir(parents=True)
    log.touch()
    (log.parent / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **more: Path(path) != log and real(path, mode, **more)
    )
    words = [finding.detail for finding in check(project, experiment="exp").failures]
    assert any(f"{log} cannot be written by this user; it belongs to {log.owner()}" in each for each in words)
    assert not any(
        "cannot be written" in finding.detail
        for finding in check(project, "resume=never", experiment="exp").failures
    )
