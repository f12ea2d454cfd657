"""Protects: the plan's answers, that what it recommends fits by its own account, and its errors."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from aquila import plan
from aquila.config import ModelConfig, RunConfig, load_model_config
from aquila.core.errors import UserError
from aquila.planning.memory import ACCELERATOR_FIXED, LARGEST_LOGITS_BYTES, TrainingSetup, estimate

SEVEN_B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "vocab_size": 100008}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**SEVEN_B, "max_seq_len": 2048}))
    return tmp_path


def run_plan(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, words)])
    return plan.main()


def test_the_benchmark_s_preset_is_what_the_plan_proposes(root: Path) -> None:
    """`train_step.py --preset gpu-7b`: Aquila-7B on one device of 141 GB."""
    preset = runpy.run_path(str(root / "benchmarks" / "train_step.py"))["PRESETS"]["gpu-7b"]
    model = ModelConfig(**preset["config"])
    assert model.parameter_count() == ModelConfig(**SEVEN_B).parameter_count()
    base = TrainingSetup(
        devices=1, batch_size=1, seq_length=preset["seq"], bucket=1e8, fixed=ACCELERATOR_FIXED
    )
    choice = plan.best(model, base, 141e9)  # less than it has: as it was measured
    assert choice.fits
    assert choice.setup.batch_size == preset["batch"]
    assert choice.setup.checkpointed_layers == preset["recompute"]


def test_memory_units() -> None:
    assert plan.parse_memory("64GB") == 64e9
    assert plan.parse_memory("80 GiB") == 80 * 2**30
    assert plan.parse_memory("80GB") == 85.5e9  # as they are sold
    assert plan.parse_memory("141 gb") == 150.7e9
    for wrong in ("64", "GB", "64 parsecs", "-1GB", "0GB"):
        with pytest.raises(UserError, match="64GB or 80GiB"):
            plan.parse_memory(wrong)


def test_the_original_s_node(monkeypatch, capsys, model_dir: Path) -> None:
    """Aquila-7B on 8 devices of 64 GB: the original recipe's ZeRO-2 with batch 2 fits, ZeRO-0 does not."""
    assert run_plan(monkeypatch, model_dir, "--devices", "8", "--memory", "64GB", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    by_stage = {(c["zero_stage"], c["offload"]): c for c in told["choices"]}
    assert not by_stage[0, False]["fits"]
    assert by_stage[2, False]["fits"]
    assert by_stage[2, False]["batch_size"] >= 2
    setup = TrainingSetup(devices=8, batch_size=2, seq_length=2048, checkpointed_layers=26, fixed=1 << 30)
    assert estimate(ModelConfig(**SEVEN_B), setup).peak < 64e9


@pytest.mark.parametrize(("devices", "memory"), [(8, "64GB"), (1024, "64GB"), (1, "141GB"), (16, "40GB")])
def test_what_is_recommended_fits(monkeypatch, capsys, model_dir: Path, devices: int, memory: str) -> None:
    assert run_plan(monkeypatch, model_dir, "--devices", devices, "--memory", memory) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("recommended"))
    words = dict(word.split("=") for word in line.split(": ")[1].split())
    run = RunConfig.model_validate({"data_prefix": ["x"], **{k: int(v) for k, v in words.items()}})
    assert run.zero_stage == int(words["zero_stage"])  # ready to paste
    setup = TrainingSetup(
        devices=devices, batch_size=int(words["batch_size"]), seq_length=2048, bucket=1e8, fixed=1 << 30,
        zero_stage=int(words["zero_stage"]), checkpointed_layers=int(words["ckpoint_layer"]),
        offload="offload" in line,
    )  # fmt: skip
    assert estimate(ModelConfig(**SEVEN_B), setup).peak < plan.parse_memory(memory)
    assert "400 Gbit/s" in out


def test_nothing_fits(monkeypatch, capsys, model_dir: Path) -> None:
    assert run_plan(monkeypatch, model_dir, "--devices", "1", "--memory", "8GB") == 2
    told = capsys.readouterr().err
    assert "nothing fits: the smallest set-up (ZeRO-2 + offload) needs" in told
    devices = re.search(r"take (\d+) devices", told)[1]
    assert run_plan(monkeypatch, model_dir, "--devices", devices, "--memory", "8GB") == 0


def test_no_number_of_devices_helps(monkeypatch, capsys, model_dir: Path) -> None:
    assert run_plan(monkeypatch, model_dir, "--devices", "4", "--memory", "3GB") == 2
    assert "more devices alone are no help" in capsys.readouterr().err


def test_a_predicted_step_time(monkeypatch, capsys, model_dir: Path) -> None:
    words = (model_dir, "--devices", "8", "--memory", "64GB", "--chip", "910B3")
    assert run_plan(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert "predicted on 910B3:" in said
    assert "not measured here" in said
    assert run_plan(monkeypatch, *words, "--link", "3", "--json") == 0
    slow = json.loads(capsys.readouterr().out)["choices"][2]
    assert slow["step_seconds"] > float(said.split("predicted on 910B3: ")[1].split()[0])


def test_the_triangle_is_counted(monkeypatch, capsys, model_dir: Path) -> None:
    (model_dir / "config.json").write_text(
        json.dumps({**SEVEN_B, "max_seq_len": 2048, "use_triangle_attn": True})
    )
    kept = []
    for words in (["--attention", "triangle"], []):
        run_plan(monkeypatch, model_dir, "--devices", "8", "--memory", "64GB", "--json", *words)
        choice = json.loads(capsys.readouterr().out)["choices"][2]
        recomputed = choice["ckpoint_layer"]
        kept.append(choice["parts"]["activations"] / choice["batch_size"] / (32 - recomputed))
    assert kept[0] > 1.4 * kept[1]


def test_devices_that_share_samples(monkeypatch, capsys, model_dir: Path) -> None:
    words = (model_dir, "--devices", "8", "--memory", "64GB", "--sequence-parallel")
    assert run_plan(monkeypatch, *words, "4") == 0
    said = capsys.readouterr().out
    assert "sequence 2048 on 4 devices" in said
    assert "sequence_parallel=4" in said
    with pytest.raises(UserError, match="--sequence-parallel 5 does not divide seq_length 2048"):
        run_plan(monkeypatch, *words, "5")
    with pytest.raises(UserError, match="--sequence-parallel 16 does not divide 8 devices"):
        run_plan(monkeypatch, *words, "16")


def test_the_tables_fit_a_terminal_of_80_columns(monkeypatch, capsys, model_dir: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run_plan(monkeypatch, model_dir, "--devices", "1024", "--memory", "64GB")
    lines = capsys.readouterr().out.splitlines()
    tables = lines[1:-1]
    assert max(map(len, tables)) <= 80
    assert not any("…" in line for line in tables)


def test_a_sequence_beyond_the_model(monkeypatch, model_dir: Path) -> None:
    with pytest.raises(UserError, match="max_seq_len 2048"):
        run_plan(monkeypatch, model_dir, "--devices", "8", "--memory", "64GB", "--seq-length", "4096")


def test_the_proposals_in_the_documents_are_the_plan_s(root: Path) -> None:
    """Aquila2-34B and 70B on 8 to 512 devices, of three sizes: docs/large-models.md."""
    text = (root / "docs" / "large-models.md").read_text(encoding="utf-8")
    for name, title in (("aquila2-34b", "Aquila2-34B"), ("aquila2-70b", "Aquila2-70B")):
        model = load_model_config(root / "checkpoints_in" / name)
        rows = text.split(f"{title}:\n\n")[1].split("\n\n")[0].splitlines()[2:]
        assert [int(row.split("|")[1]) for row in rows] == [8, 16, 32, 64, 128, 256, 512]
        for row in (rows[0], rows[3], rows[6]):
            devices, *told = [cell.strip() for cell in row.strip("|").split("|")]
            base = TrainingSetup(
                devices=int(devices), batch_size=1, seq_length=model.max_seq_len, bucket=1e8,
                fixed=ACCELERATOR_FIXED, logits_bytes=LARGEST_LOGITS_BYTES,
            )  # fmt: skip
            for memory, cell in zip(("64GB", "80GB", "141GB"), told, strict=True):
                fitting = [c for c in plan.best_of_stages(model, base, plan.parse_memory(memory)) if c.fits]
                chosen = plan.recommended(fitting, model).setup
                found = f"{plan.stage_name(chosen)}, {chosen.batch_size}, {chosen.checkpointed_layers}"
                assert found == cell, (name, devices, memory)
