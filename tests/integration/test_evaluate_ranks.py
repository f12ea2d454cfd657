"""`python -m aquila.evaluate` on an indexed dataset: several ranks give the number of one."""

import json
import os
import subprocess
import sys

import pytest

from tests.unit.generation.models import write_model_dir

TEXTS = ["one plus two is three.", "三加四等于七。", "🙂 ", "a longer text, " * 40, "half past ten"] * 5


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, root):
    return write_model_dir(tmp_path_factory.mktemp("model"), root, max_seq_len=64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, root, model_dir):
    folder = tmp_path_factory.mktemp("data")
    text = folder / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    command = [
        sys.executable, "-m", "data_tools.make_indexed_dataset",
        "--input", text, "--output-prefix", folder / "texts", "--model-dir", model_dir, "--workers", "1",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=root, capture_output=True)
    return folder / "texts_text_document"


def run(root, *arguments, ranks=1, status=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*start, "aquila.evaluate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, cwd=root, env=environment, timeout=200)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_two_ranks_equal_one_and_text_equals_dataset(root, model_dir, dataset):
    base = ("--model-dir", model_dir, "--json", "--batch-tokens", 300)
    one = json.loads(run(root, *base, "--data", dataset)[0])
    two = json.loads(run(root, *base, "--data", dataset, ranks=2)[0])
    text = json.loads(run(root, *base, "--data", dataset.parent / "texts.jsonl")[0])
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for key in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "documents"):
        assert one[key] == two[key] == text[key]
    assert one["bytes"] == sum(len(one.encode()) for one in TEXTS)


def test_table_for_people_and_another_tokenizers_data_is_refused(root, model_dir, dataset, tmp_path):
    shown, _ = run(root, "--model-dir", model_dir, "--data", dataset, "--limit", 3)
    assert "perplexity" in shown
    assert "bits per byte" in shown
    other = tmp_path / "other_text_document"
    for suffix in (".bin", ".idx"):
        other.with_name(other.name + suffix).write_bytes(
            (dataset.parent / (dataset.name + suffix)).read_bytes()
        )
    meta = json.loads((dataset.parent / (dataset.name + ".meta.json")).read_text())
    meta["tokenizer"]["fingerprint"] = "0" * 64
    other.with_name(other.name + ".meta.json").write_text(json.dumps(meta))
    _, messages = run(root, "--model-dir", model_dir, "--data", other, status=2)
    assert "another tokenizer" in messages
    assert "Traceback" not in messages


def test_a_datasets_file_stands_for_its_prefix_and_a_device_may_have_a_number(root, model_dir, dataset):
    base = ("--model-dir", model_dir, "--limit", 3, "--json", "--device", "cpu:0")
    by_file = json.loads(run(root, *base, "--data", f"{dataset}.bin")[0])
    assert (by_file["documents"], by_file["data"]) == (3, str(dataset))


@pytest.mark.parametrize("device", ["abacus", "cpu:x", "cuda:1000"])
def test_a_device_that_is_not_here_is_a_users_mistake(root, model_dir, dataset, device):
    _, messages = run(root, "--model-dir", model_dir, "--data", dataset, "--device", device, status=2)
    assert f"device '{device}' is not here" in messages
    assert "Traceback" not in messages
