"""Answers only: which tokens of a conversation count, beside the same tokens as without a mask."""

import json
import shutil

import numpy as np
import pytest

from aquila.core.errors import UserError
from aquila.data.indexed import open_corpora
from aquila.data.indexfile import bin_path, idx_path, read_index, read_tokens
from aquila.data.loss_mask import marked, mask_prefix
from aquila.data.merge import merge_datasets
from aquila.data.meta import check_dataset, meta_path, read_meta
from aquila.data.prepare.answers import answer_mask, conversation, conversation_parts
from aquila.data.prepare.pipeline import PrepareOptions, make_datasets
from aquila.data.verify import verify_dataset
from aquila.tokenizer import load_tokenizer

TALKS = [
    [("system", "Be brief."), ("human", "Which day follows Monday?"), ("gpt", "Tuesday."), ("user", "将进酒"),
     ("assistant", "君不见🙂")],
    [("human", "hi"), ("gpt", ""), ("human", "still there?")],
]  # fmt: skip


def turns(talk):
    return [{"from": sender, "value": value} for sender, value in talk]


@pytest.fixture(scope="module")
def tokenizer(root):
    return load_tokenizer(root / "checkpoints_in/aquila-tiny")


@pytest.fixture
def made(tokenizer, tmp_path):
    """`made(name, mask_prompts=...)` prepares the conversations and a plain text, and gives the prefix."""
    lines = [{"conversations": turns(talk)} for talk in TALKS] + [{"text": "a plain text"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def make(name, **options):
        make_datasets(
            PrepareOptions([str(tmp_path / "in.jsonl")], str(tmp_path / name), **options), tokenizer
        )
        return str(tmp_path / f"{name}_text_document")

    return make


def split(prefix):
    index = read_index(prefix)
    return np.split(np.array(read_tokens(prefix, index)), np.cumsum(index.lengths)[:-1])


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_and_what_ends_them_count(made, tokenizer, workers):
    prefix = made("masked", mask_prompts=True, template="aquila", workers=workers)
    plain = made("plain", template="aquila")
    assert bin_path(prefix).read_bytes() == bin_path(plain).read_bytes()
    assert idx_path(prefix).read_bytes() == idx_path(plain).read_bytes()
    documents, masks = split(prefix), split(mask_prefix(prefix))
    texts = [
        marked(ids.tolist(), mask.astype(bool), tokenizer) for ids, mask in zip(documents, masks, strict=True)
    ]
    # A token that holds the space before an answer and its first letters is the answer's.
    assert texts[0] == (
        "[CLS]Be brief.###Human: Which day follows Monday?###Assistant:⟦ Tuesday.###⟧Human: 将进酒"
        "###Assistant: ⟦君不见🙂</s>⟧"
    )
    assert texts[1].endswith("###Assistant: ⟦###⟧Human: still there?</s>")
    assert texts[2] == "[CLS]⟦a plain text</s>⟧"
    assert verify_dataset(prefix) == []
    facts = read_meta(prefix)["loss_mask"]
    assert facts["counted"] == sum(int(mask.sum()) for mask in masks)
    assert "loss_mask" not in read_meta(plain)


def test_a_new_making_without_a_mask_leaves_none_behind(made):
    prefix = made("d", mask_prompts=True)
    assert bin_path(mask_prefix(prefix)).is_file()
    assert made("d") == prefix
    assert not bin_path(mask_prefix(prefix)).exists()
    assert not idx_path(mask_prefix(prefix)).exists()


@pytest.mark.parametrize("template", ["plain", "aquila"])
def test_parts_make_the_text(template):
    for talk in TALKS:
        parts = conversation_parts(turns(talk), template, answers=True)
        assert "".join(text for text, _ in parts) == conversation(turns(talk), template)


def test_conversations_without_an_answer_or_of_unknown_roles_are_bad(made, tokenizer, tmp_path):
    for talk, message in (
        ([("human", "hi")], "no turn is an assistant's"),
        ([("bot", "hi")], "turn 1 is from 'bot'"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps({"conversations": turns(talk)}))
        options = PrepareOptions([str(tmp_path / "bad.jsonl")], str(tmp_path / "bad"), mask_prompts=True)
        with pytest.raises(UserError, match=message):
            make_datasets(options, tokenizer)


def test_a_tokenizer_that_rewrites_its_text_is_refused():
    sizes, ids = np.array([1, 1, 5]), np.array([0, 2, 1])
    with pytest.raises(UserError, match="rewrites its text"):
        answer_mask(sizes, ids, [("ab", True)])


def test_a_space_that_is_put_before_every_text_belongs_to_nobody():
    sizes, ids = np.array([0, 3, 2]), np.array([0, 1, 2, 0])  # " ab" and "cd"
    assert answer_mask(sizes, ids, [("ab", False), ("cd", True)]).tolist() == [0, 0, 1, 1]


def test_samples_carry_their_mask(made):
    prefix = made("d", mask_prompts=True, template="aquila")
    stream = open_corpora([prefix], "100", 16, 7).train
    assert stream.is_masked
    tokens, masks = np.concatenate(split(prefix)), np.concatenate(split(mask_prefix(prefix)))
    index = read_index(prefix)
    for k in range(stream.samples_per_epoch):
        sample = stream[k]
        starts = index.offsets[list(sample.provenance.document_ids)] // 4
        ends = starts + index.lengths[list(sample.provenance.document_ids)]
        places = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        places = places[sample.provenance.first_offset :][:17]
        assert tokens[places].tolist() == sample.tokens.tolist()
        assert masks[places].tolist() == sample.mask.tolist()


def test_a_mask_that_does_not_fit_is_refused_before_a_run(made, tokenizer):
    prefix = made("d", mask_prompts=True)
    check_dataset(prefix, tokenizer, tokenizer.vocab_size)
    good = bin_path(mask_prefix(prefix)).read_bytes()
    bin_path(mask_prefix(prefix)).write_bytes(good[:-1])
    with pytest.raises(UserError, match="_loss_mask"):
        check_dataset(prefix, tokenizer, tokenizer.vocab_size)
    bin_path(mask_prefix(prefix)).write_bytes(bytes([1 - good[0]]) + good[1:])
    assert verify_dataset(prefix)
    bin_path(mask_prefix(prefix)).unlink()
    with pytest.raises(UserError, match="_loss_mask"):
        open_corpora([prefix], "100", 16, 7)
    meta = json.loads(meta_path(prefix).read_text())
    meta["loss_mask"] = 5
    meta_path(prefix).write_text(json.dumps(meta))
    with pytest.raises(UserError, match="loss_mask is damaged"):
        check_dataset(prefix, tokenizer, tokenizer.vocab_size)


def test_masks_merge_and_data_without_one_counts_whole(made, tmp_path):
    masked, plain = made("m", mask_prompts=True), made("p")
    merge_datasets([masked, plain], str(tmp_path / "both"))
    assert verify_dataset(tmp_path / "both") == []
    first, second = split(mask_prefix(masked)), split(plain)
    wanted = [*(mask.tolist() for mask in first), *([0] + [1] * (len(ids) - 1) for ids in second)]
    assert [mask.tolist() for mask in split(mask_prefix(tmp_path / "both"))] == wanted
    shutil.copy(bin_path(mask_prefix(tmp_path / "both")), tmp_path / "kept")
    merge_datasets([plain, made("q")], str(tmp_path / "both"))
    assert not bin_path(mask_prefix(tmp_path / "both")).exists()
