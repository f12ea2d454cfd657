"""The tools as a user calls them, on a dataset made by the command."""

import json
import shutil
import subprocess
import sys

import pytest

from aquila.data.indexed import open_corpora
from aquila.data.order import FILE, order_text

MODEL = "checkpoints_in/aquila-tiny"


@pytest.fixture(scope="module")
def tool(root):
    def run(name, *arguments, status=0):
        words = [sys.executable, "-m", f"data_tools.{name}", *map(str, arguments)]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def dataset(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tool("make_demo_corpus", "--output", folder / "demo.jsonl", "--documents", 300)
    tool(
        "make_indexed_dataset", "--input", folder / "demo.jsonl",
        "--output-prefix", folder / "demo", "--model-dir", MODEL,
    )  # fmt: skip
    return folder / "demo_text_document"


def test_inspect(tool, dataset, tmp_path):
    shown = tool(
        "inspect_dataset", dataset, "--documents", "0..1", "--model-dir", MODEL,
        "--histogram", "--png", tmp_path / "h.png",
    )  # fmt: skip
    assert "300 documents" in shown
    first = json.loads(dataset.with_name("demo.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    assert f"[CLS]{first}</s>" in shown
    assert "document 1:" in shown
    assert "% of tokens" in shown
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert "documents 0..299" in tool("inspect_dataset", dataset, "--documents", "5..300", status=2)


def test_verify_and_merge(tool, dataset, tmp_path):
    assert "good" in tool("verify_dataset", dataset)
    tool("merge_datasets", "--input", dataset, dataset, "--output-prefix", tmp_path / "two")
    assert "good" in tool("verify_dataset", tmp_path / "two")
    path = tmp_path / "two.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut off" in tool("verify_dataset", dataset, tmp_path / "two", status=2)


def test_build_index_is_what_training_opens(tool, dataset, tmp_path):
    for path in dataset.parent.glob("demo_text_document.*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    prefix = tmp_path / dataset.name
    before = open_corpora([str(prefix)], "90,10", 64, 2023)
    arguments = (
        "configs/Aquila-tiny.yaml",
        "aquila-tiny",
        f"data_prefix=[{prefix}]",
        "seq_length=64",
        "seed=2023",
    )
    shown = tool("build_index", *arguments, "split=90,10", "--epochs", 2)
    assert shown.count("training, epoch") == 2
    after = open_corpora([str(prefix)], "90,10", 64, 2023)
    assert all(after.train.corpora[0].is_stored(epoch) for epoch in (0, 1))
    assert after.valid.corpora[0].is_stored(0)
    for k in range(0, 2 * before.train.samples_per_epoch, 7):
        assert before.train[k].tokens.tolist() == after.train[k].tokens.tolist()


def test_show_batch(tool, dataset, tmp_path):
    stream = open_corpora([str(dataset)], "90,10", 64, 2023).train
    (tmp_path / FILE).write_text(order_text(stream), encoding="utf-8")
    logged = [{"step": s, "consumed_samples": c} for s, c in ((10, 40), (20, 80), (25, 120))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in logged))
    shown = tool("show_batch", tmp_path, "--step", 13, "--json", "--model-dir", MODEL).splitlines()
    assert [json.loads(line)["sample"] for line in shown] == [48, 49, 50, 51]
    for line in map(json.loads, shown):
        assert tuple(line["documents"]) == stream[line["sample"]].provenance.document_ids
    shown = tool("show_batch", tmp_path, "--step", 22).splitlines()
    assert "samples 88 to 95" in shown[0]
    assert len(shown) == 9
    assert "steps 1 to 25" in tool("show_batch", tmp_path, "--step", 26, status=2)
    assert "is a run folder" in tool("show_batch", dataset.parent, "--step", 1, status=2).replace(
        "is " + str(dataset.parent), "is"
    )


@pytest.mark.parametrize(
    "name",
    [
        "make_demo_corpus", "train_tokenizer", "make_indexed_dataset", "merge_datasets",
        "inspect_dataset", "verify_dataset", "build_index", "show_batch",
    ],
)  # fmt: skip
def test_help(tool, name):
    assert "usage:" in tool(name, "--help")
