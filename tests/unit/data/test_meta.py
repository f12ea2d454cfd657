"""A run refuses data of another tokenizer, ids beyond the vocabulary and damaged files, without torch."""

import json
import subprocess
import sys

import pytest

from aquila.core.errors import UserError
from aquila.data.indexfile import bin_path, idx_path
from aquila.data.meta import check_dataset, meta_path
from aquila.data.prepare.pipeline import PrepareOptions, make_datasets
from aquila.tokenizer import load_tokenizer
from tests.unit.data.conftest import write_dataset


@pytest.fixture(scope="module")
def tokenizer(root):
    return load_tokenizer(root / "checkpoints_in/aquila-tiny")


@pytest.fixture
def made(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "3 + 4 = 7."}\n{"text": "8 + 1 = 9."}\n')
    make_datasets(PrepareOptions([str(tmp_path / "d.jsonl")], str(tmp_path / "d")), tokenizer)
    return tmp_path / "d_text_document"


def test_good_dataset(made, tokenizer):
    assert check_dataset(made, tokenizer, tokenizer.vocab_size) is None
    meta = json.loads(meta_path(made).read_text())
    assert meta["tokenizer"]["bos_id"] == tokenizer.bos_id
    assert meta["counts"]["documents"] == 2
    assert meta["inputs"][0]["size"] == 46
    assert len(meta["inputs"][0]["sha256"]) == 64


def test_another_tokenizer(made, tokenizer):
    meta = json.loads(meta_path(made).read_text())
    meta["tokenizer"]["fingerprint"] = "0" * 64
    meta_path(made).write_text(json.dumps(meta))
    with pytest.raises(UserError, match="another tokenizer"):
        check_dataset(made, tokenizer, tokenizer.vocab_size)


def test_ids_beyond_the_vocabulary(made, tokenizer):
    with pytest.raises(UserError, match=rf"token id {tokenizer.eos_id}, outside .* {tokenizer.eos_id} ids"):
        check_dataset(made, tokenizer, tokenizer.eos_id)
    check_dataset(made, tokenizer, tokenizer.eos_id + 1)


def test_dataset_of_megatron_itself_is_scanned(tmp_path, tokenizer):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "m")))
    for document in ([5, 6, 7], [900]):
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(idx_path(tmp_path / "m")))
    assert "ids 5..900 fit" in check_dataset(tmp_path / "m", tokenizer, 901)
    with pytest.raises(UserError, match="token id 900"):
        check_dataset(tmp_path / "m", tokenizer, 900)


def test_megatrons_reader_reads_ours(made, tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(made))
    assert [tokenizer.decode(d) for d in dataset] == ["3 + 4 = 7.", "8 + 1 = 9."]
    assert dataset.document_indices.tolist() == [0, 1, 2]


def test_our_bytes_are_megatrons_builders(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[1, 2, 3], [4], [70_000, 6]]
    ours = write_dataset(tmp_path / "ours", documents)
    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "theirs")))
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(idx_path(tmp_path / "theirs")))
    for path in (bin_path, idx_path):
        assert path(ours).read_bytes() == path(tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("extension", [".bin", ".idx"])
@pytest.mark.parametrize("cut", [-8, -1, 1])
def test_files_cut_off_or_longer(made, tokenizer, extension, cut):
    path = bin_path(made) if extension == ".bin" else idx_path(made)
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut < 0 else data + b"x")
    with pytest.raises(UserError, match=extension):
        check_dataset(made, tokenizer, 10**6)


def test_files_of_two_makings(made, tmp_path, tokenizer):
    other = write_dataset(tmp_path / "other", [[1, 2, 3]])
    for path in (bin_path, idx_path):
        path(made).write_bytes(path(other).read_bytes())
    with pytest.raises(UserError, match="not of one making"):
        check_dataset(made, tokenizer, 10**6)


def test_missing_files(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"make it with data_tools/make_indexed_dataset\.sh"):
        check_dataset(tmp_path / "none", tokenizer, 10)


def test_checks_need_no_torch(root):
    code = "import aquila.data.meta, aquila.data.prepare.pipeline, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
