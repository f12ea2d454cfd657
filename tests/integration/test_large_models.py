"""ZeRO-3 as a whole: no rank ever holds the model, from the first byte on, and training is that of ZeRO-2."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from aquila.config import load_model_config
from aquila.model import AquilaModel
from aquila.model.weights import save_weights
from tests.integration.launch_helpers import ROOT, environment
from tests.integration.training_runs import MODEL, RUN, add_model, make_project, metrics, run_jobs

pytestmark = pytest.mark.slow

LARGE = MODEL | {"dim": 1024, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "multiple_of": 64}
"""Of 400 MiB in fp32: what a rank holds besides tensors is little beside that."""

HPZ = {
    "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0,
    "stage3_allgather_sequential": True, "leaf_module": {"classes": ["Block"]},
}  # fmt: skip
"""Weights divided a second time, among each two ranks, and as many fetched as can be."""
SMALL_BUCKETS = {
    "reduce_bucket_size": 1e6, "stage3_prefetch_bucket_size": 1e6, "stage3_max_live_parameters": 4e6,
    "stage3_max_reuse_distance": 1e6, "stage3_param_persistence_threshold": 1e4,
}  # fmt: skip


def job(ranks: int, experiment: str, *overrides: str, model: str = "small", **more) -> dict:
    fixed = ("precision=fp32", "gradient_accumulation_steps=1", "train_iters=4", "eval_interval=0")
    batch = f"batch_size={8 // ranks}"
    return {"ranks": ranks, "args": ["run.yaml", model, experiment, *fixed, batch, *overrides], **more}


def checkpoint(experiment: str, step: int) -> str:
    return f"checkpoints_out/{experiment}/0/checkpoints/step-{step:08d}"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    project = make_project(tmp_path_factory.mktemp("large"))
    large = add_model(project, "large", LARGE)
    model = AquilaModel(load_model_config(large), seed=1)
    save_weights(model, large)
    shutil.copytree(large, project / "checkpoints_in" / "torch")
    (project / "checkpoints_in" / "torch" / "model.safetensors").unlink()
    torch.save(model.state_dict(), project / "checkpoints_in" / "torch" / "pytorch_model.bin")
    for name, zero in {"hpz": HPZ, "small-buckets": SMALL_BUCKETS}.items():
        (project / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
        (project / f"{name}.yaml").write_text(yaml.safe_dump(RUN | {"deepspeed_config": f"{name}.json"}))
    return project


def made(config: str, made: dict) -> dict:
    """The job with another configuration."""
    made["args"][0] = f"{config}.yaml"
    return made


@pytest.fixture(scope="module")
def runs(project) -> str:
    """All runs of this file, each with its status 0, and what they printed."""
    every = ("zero_stage=3", "save_interval=2", "replica_check_interval=1")
    jobs = [
        job(4, "two", "zero_stage=2", "save_interval=2"),
        job(4, "three", *every, "export=hf", "export_every=2"),
        job(4, "again", *every, f"resume={checkpoint('three', 2)}"),
        job(2, "fewer", *every, f"resume={checkpoint('three', 2)}"),
        made("small-buckets", job(4, "step", "zero_stage=3", "train_iters=2", model="large", memory="step")),
        made("hpz", job(4, "hierarchical", *every, "eval_interval=2")),
        job(2, "flat", *every, f"resume={checkpoint('hierarchical', 2)}"),
        job(4, "build", "zero_stage=3", model="large", memory=True),
        *(
            job(
                4, "build", "zero_stage=3", "precision=bf16", f"bmt_pre_load={load}", model=model, memory=True
            )
            for model, load in (("large", False), ("large", True), ("torch", True))
        ),
    ]
    statuses, printed = run_jobs(project, jobs)
    assert "its logits verified" in printed
    assert statuses == [[0] * job["ranks"] for job in jobs], printed
    return printed


def test_training_and_resuming_are_those_of_zero_2(project, runs):
    two = metrics(project, "two")
    for experiment in ("three", "again", "fewer", "hierarchical", "flat"):
        records = metrics(project, experiment)
        for one, other in zip(two[-len(records) :], records, strict=True):
            assert one["step"] == other["step"]
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-6)


def test_weights_are_written_by_several_ranks_and_read_by_all(project, runs):
    folder = project / checkpoint("three", 4)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sharded, whole = (AquilaModel.from_pretrained(project / checkpoint(e, 4)) for e in ("three", "two"))
    assert set(index["weight_map"]) == {name for name, _ in sharded.named_parameters()}
    for one, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def tool(project: Path, *words: str) -> str:
    """What a command of the project prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=project,
        env=environment(project) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_tool_reads_what_several_ranks_wrote(project, runs):
    """As it reads the single file of ZeRO-2, whose weights are the same within 1e-6."""
    found = []
    for experiment in ("three", "two"):
        folder = checkpoint(experiment, 4)
        prompt = ("--prompt", "the", "--max-new-tokens", "8", "--temperature", "0", "--json")
        answer = json.loads(tool(project, str(ROOT / "generate.py"), "--model-dir", folder, *prompt))
        report = json.loads(
            tool(project, "-m", "aquila.evaluate", "--model-dir", folder, "--data", "demo.jsonl", "--json")
        )
        found.append((answer, report["loss"]))
    (answer, loss), (other, other_loss) = found
    assert answer["text"] == other["text"]
    assert answer["text"]
    assert loss == pytest.approx(other_loss, abs=1e-6)


@pytest.mark.parametrize("form", ["aquila", "hf", "gguf"])
def test_it_is_converted(project, runs, form):
    """The copies hold the checkpoint's numbers; the run's own export is the same."""
    output = f"checkpoints_in/copy-{form}" + (".gguf" if form == "gguf" else "")
    words = ("--input", checkpoint("three", 4), "--output", output, "--to", form)
    tool(project, "-m", "aquila.convert", *words, *(() if form == "gguf" else ("--verify",)))
    if form == "gguf":
        assert (project / output).read_bytes()[:4] == b"GGUF"
        return
    source = dict(AquilaModel.from_pretrained(project / checkpoint("three", 4)).named_parameters())
    for folder in [output] + (["checkpoints_out/three/0/exports/step-00000004-hf"] if form == "hf" else []):
        copy = AquilaModel.from_pretrained(project / folder)
        assert all(torch.equal(source[name], parameter) for name, parameter in copy.named_parameters())


def test_no_rank_holds_the_model_while_it_is_built_or_loaded(runs):
    """From random values in fp32 and bf16, and from fp32 files in bf16: a quarter, and a parameter."""
    peaks = [float(part) for part in re.findall(r"PEAK \d ([\d.]+)", runs)]
    assert len(peaks) == 16
    assert max(peaks) <= 0.35


def test_no_rank_holds_the_model_in_a_step(runs):
    """What forward gathers is dropped, not kept for backward: it had been nearly the whole model."""
    peaks = [float(part) for part in re.findall(r"STEP \d ([\d.]+)", runs)]
    assert len(peaks) == 4
    assert max(peaks) < 0.5
