"""Ids are the original's, both engines agree on them, and decoding never breaks a character."""

import json
import random
import shutil
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila.core.errors import UserError
from aquila.tokenizer import SPECIAL_TOKENS, BytePairTokenizer, bytepair, fast, load_tokenizer

TINY = "checkpoints_in/aquila-tiny"


@pytest.fixture(scope="module")
def aquila(shared_dir):
    return load_tokenizer(shared_dir / "data/aquila-tokenizer")


@pytest.fixture(scope="module")
def tiny(root):
    return load_tokenizer(root / TINY)


@pytest.fixture(scope="module")
def any_tokenizer(root):
    """The real vocabulary where it is at hand, else ours."""
    real = root.parent / "shared/data/aquila-tokenizer"
    return load_tokenizer(real if real.is_dir() else root / TINY)


def test_golden_ids(aquila, shared_dir):
    for case in json.loads((shared_dir / "data/golden/tokenizer.json").read_text()):
        assert aquila.encode(case["text"]) == case["ids"]
        assert aquila.decode(case["ids"]) == case["text"]


def test_special_ids_of_aquila(aquila):
    assert aquila.vocab_size == 100008
    assert (aquila.bos_id, aquila.eos_id, aquila.pad_id) == (100006, 100007, 0)
    assert aquila.special_tokens["<|startofpiece|>"] == 100000
    assert aquila.special_tokens["[sMASK]"] == 100005


def test_special_ids_follow_the_last_id(tiny, root):
    last = max(json.loads((root / TINY / "vocab.json").read_text(encoding="utf-8")).values())
    assert list(tiny.special_tokens.values())[1:] == list(range(last + 1, last + 9))
    assert tiny.vocab_size == last + 9


def test_corpus_text_never_becomes_a_special_token(tiny):
    for name in tiny.special_tokens:
        ids = tiny.encode(f"a{name}b")
        assert not set(ids) & set(tiny.special_tokens.values())
        assert tiny.decode(ids) == f"a{name}b"
    allowed = tiny.encode("[CLS]hi</s>", allow_special=True)
    assert allowed == [tiny.bos_id, *tiny.encode("hi"), tiny.eos_id]


def test_both_engines_agree_on_real_text(aquila, shared_dir):
    assert aquila.is_fast
    text = (shared_dir / "data/corpus/aquila-demo.jsonl").read_text(encoding="utf-8")
    assert aquila.encode(text) == aquila.definition.encode(text).ids


WILD = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    st.text(
        alphabet=" \t\n\r'sdmtlver019aZ_-.,;()[]{}<>/|中文字日本語한국어éÀ\u0301\u200d🙂👍🏽\u00a0\u3000"
    ),
    st.sampled_from(
        ["def f(x):\n\treturn x  # ok", "I'll we've '''", "\u1100\u1161\u11a8", "e\u0301\u0327", "🏳️‍🌈"]
    ),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(WILD, max_size=4).map("".join))
def test_both_engines_agree_on_any_text(any_tokenizer, text):
    tokenizer = any_tokenizer
    assert tokenizer.is_fast
    ids = tokenizer.encode(text)
    assert ids == tokenizer.definition.encode(text).ids
    assert tokenizer.decode(ids) == text


def test_both_engines_class_every_character_alike(any_tokenizer):
    """Every assigned code point, and one in 64 of the others, beside a letter, digit, mark and space."""
    unassigned = {"Cn", "Co", "Cs"}
    every = "".join(
        chr(c)
        for c in range(0x110000)
        if unicodedata.category(chr(c)) not in unassigned or (c % 64 == 0 and not 0xD800 <= c <= 0xDFFF)
    )
    for start in range(0, len(every), 1 << 16):
        text = "".join(f"a{c}1{c}.{c} {c}" for c in every[start : start + (1 << 16)])
        assert np.array_equal(any_tokenizer.encode_array(text), any_tokenizer.definition.encode(text).ids)


@pytest.mark.parametrize("letter", [" ", "\n", "a", "字", "-", "9", "\u0301"])
def test_a_long_run_of_one_character(tiny, letter):
    text = letter * 50_000
    assert tiny.encode(text) == tiny.definition.encode(text).ids


def test_a_million_blanks(any_tokenizer):
    ids = any_tokenizer.encode(" " * 1_000_000 + "end")
    assert any_tokenizer.decode(ids) == " " * 1_000_000 + "end"


def test_memory_of_words_is_bounded_by_renewal(tiny, monkeypatch):
    monkeypatch.setattr(fast, "_GROWTH", 4 << 20)
    monkeypatch.setattr(fast, "_CHECK_BYTES", 1 << 16)
    rng = random.Random(5)
    texts = [" ".join(f"{rng.getrandbits(80):x}" for _ in range(20_000)) for _ in range(30)]
    before = tiny._fast.renewals
    encoded = [tiny.encode(text) for text in texts]
    assert tiny._fast.renewals > before
    assert encoded[-1] == tiny.definition.encode(texts[-1]).ids


@pytest.mark.parametrize("fault", ["missing", "wrong ids", "panic"])
def test_without_gigatoken_the_definition_encodes_and_says_so(root, monkeypatch, fault):
    class Panic(BaseException):
        pass

    class Odd(fast.FastEncoder):
        def __init__(self, vocab, merges):
            if fault == "missing":
                raise ImportError("No module named 'gigatoken'")
            if fault == "panic":
                raise Panic("index out of bounds")
            super().__init__(vocab, merges)

        def encode(self, text):
            return super().encode(text.replace("ß", "s"))

    monkeypatch.setattr(bytepair, "FastEncoder", Odd)
    tokenizer = load_tokenizer(root / TINY)
    assert not tokenizer.is_fast
    assert tokenizer.engine.startswith("tokenizers, 20 times slower: ")
    assert {"missing": "pip install", "wrong ids": "other ids", "panic": "bounds"}[fault] in tokenizer.engine
    assert tokenizer.encode("ß ok") == tokenizer.definition.encode("ß ok").ids


def test_the_versions_of_gigatoken_are_those_required(root):
    assert fast.VERSIONS in (root / "requirements/core.txt").read_text().splitlines()


def test_long_text_is_cut_without_changing_ids(tiny, monkeypatch):
    text = "I'm here. It's  two\n\n 3 things, don't x1y2 一二三。四五，六 'll a_b " * 40
    whole = tiny.definition.encode(text).ids
    for size in (1, 2, 3, 7, 50):
        monkeypatch.setattr(bytepair, "_LONG", size)
        assert len(bytepair._pieces(text)) > 3
        assert tiny.encode(text) == whole


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(WILD, st.sampled_from(["", "<", ">", "\0<", "[CLS]", "a\0"])), max_size=6))
def test_documents_in_one_call_are_those_one_by_one(any_tokenizer, texts):
    tokens, lengths = any_tokenizer.encode_documents(texts)
    framed = [[any_tokenizer.bos_id, *any_tokenizer.encode(t), any_tokenizer.eos_id] for t in texts]
    assert lengths.tolist() == [len(ids) for ids in framed]
    assert tokens.tolist() == [i for ids in framed for i in ids]


@settings(max_examples=200, deadline=None)
@given(WILD, st.integers(1, 5))
def test_any_text_is_cut_without_changing_ids(any_tokenizer, text, size):
    tokenizer = any_tokenizer
    before, bytepair._LONG = bytepair._LONG, size
    try:
        assert tokenizer.encode(text) == tokenizer.definition.encode(text).ids
    finally:
        bytepair._LONG = before


def test_lone_surrogate_is_refused(tiny, root):
    for tokenizer in (tiny, BytePairTokenizer(root / TINY, fast=False)):
        with pytest.raises(UserError, match=r"character 3 is U\+D83D"):
            tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("skip", [True, False])
def test_stream_gives_whole_characters(tiny, skip):
    text = "日本 🙂 é 中"
    ids = [tiny.bos_id, *tiny.encode(text), tiny.eos_id]
    stream = tiny.decode_stream(skip)
    pushed = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(pushed)
    assert (
        "".join(pushed) + stream.flush() == tiny.decode(ids, skip) == (text if skip else f"[CLS]{text}</s>")
    )


def test_unfinished_character_is_flushed(tiny):
    stream = tiny.decode_stream()
    ids = [i for i in tiny.encode("𝔘") if i]
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"


def test_id_outside_the_vocabulary(tiny):
    with pytest.raises(UserError, match="outside the vocabulary"):
        tiny.decode([tiny.vocab_size])
    with pytest.raises(UserError, match="outside the vocabulary"):
        tiny.decode([-1])


def _copy(root, tmp_path):
    return shutil.copytree(root / TINY, tmp_path / "copy")


def test_fingerprint_follows_content_not_formatting(tiny, root, tmp_path):
    folder = _copy(root, tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(dict(sorted(vocab.items())), indent=1))
    assert load_tokenizer(folder).fingerprint == tiny.fingerprint
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges[1], merges[2] = merges[2], merges[1]
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    assert load_tokenizer(folder).fingerprint != tiny.fingerprint


def _write_bpe(folder, merges, order=None):
    folder.mkdir()
    tokens = ["<|endoftext|>", *bytepair._byte_letters(), *dict.fromkeys(a + b for a, b in merges)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(order or tokens)}))
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges))
    return folder


def test_vocabulary_whose_joins_cross(tmp_path):
    """'bc' is joined before 'ab', so 'abc' = ab + c is never made, though it is a token."""
    odd = load_tokenizer(_write_bpe(tmp_path / "odd", [("b", "c"), ("a", "b"), ("ab", "c")]))
    assert odd.is_fast
    assert odd.encode("abc") == odd.definition.encode("abc").ids
    assert [odd.token_bytes(i) for i in odd.encode("abc")] == [b"a", b"bc"]
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
    twice = load_tokenizer(_write_bpe(tmp_path / "two", merges))
    assert "two merges make the same token" in twice.engine
    assert twice.encode("abc") == twice.definition.encode("abc").ids


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=12), st.text(alphabet="abcd ", max_size=40))
def test_both_engines_agree_on_any_vocabulary(tmp_path_factory, choices, text):
    """Merges drawn at random, the tokens' ids in another order than the merges."""
    made, merges = list("abcd"), []
    for choice in choices:
        pair = (made[choice % len(made)], made[choice // 7 % len(made)])
        if len("".join(pair)) <= 8 and "".join(pair) not in made:
            merges.append(pair)
            made.append("".join(pair))
    tokens = ["<|endoftext|>", *bytepair._byte_letters(), *made[4:]]
    folder = tmp_path_factory.mktemp("any") / "bpe"
    for order in (tokens, tokens[::-1]):
        tokenizer = load_tokenizer(_write_bpe(folder, merges, order))
        assert tokenizer.is_fast
        assert tokenizer.encode(text) == tokenizer.definition.encode(text).ids
        shutil.rmtree(folder)


def test_special_tokens_that_the_vocabulary_already_has_keep_their_ids(tmp_path):
    tokens = ["<|endoftext|>", *bytepair._byte_letters(), *SPECIAL_TOKENS]
    own = load_tokenizer(_write_bpe(tmp_path / "own", [], tokens))
    assert own.vocab_size == len(tokens)
    assert own.bos_id == tokens.index("[CLS]")
    assert own.bos_id not in own.encode("[CLS]")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", '{"a": 0, "b": 0}', "share an id"),
        ("vocab.json", '{"a": "x"}', "whole number"),
        ("vocab.json", '{"a": 2147483648}', "whole number from 0 to"),
        ("vocab.json", '{"a": 0, "\\ud800": 1}', "half of a surrogate pair"),
        ("merges.txt", "#version\na b c\n", "line 2"),
        ("merges.txt", None, "does not exist"),
        ("special_tokens_map.json", '{"cls_token": "[BOS]"}', "is no special token"),
        ("special_tokens_map.json", '{"cls_token": ["[CLS]"]}', "is no special token"),
        ("special_tokens_map.json", '{"sep_token": 5}', "is no special token"),
    ],
)
def test_broken_files_are_named(root, tmp_path, name, content, message):
    folder = _copy(root, tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(folder)
    assert name in str(raised.value)


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def piece_dir(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    texts = [f"the day after Monday is Tuesday {i} 星期一的后一天" for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), vocab_size=320,
        byte_fallback=True, model_type="bpe", hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder


def test_sentencepiece_model(piece_dir):
    import sentencepiece

    pieces = load_tokenizer(piece_dir)
    model = sentencepiece.SentencePieceProcessor(model_file=str(piece_dir / "tokenizer.model"))
    last = model.vocab_size() - 1
    assert (pieces.bos_id, pieces.eos_id, pieces.vocab_size) == (last + 7, last + 8, last + 9)
    for text in ("the day", "  two  spaces ", "星期一 🙂 é", "unseen: ЖЩ\n\ttabs", "a</s>b[CLS]"):
        ids = pieces.encode(text)
        assert ids == model.encode(text)
        assert pieces.decode(ids) == model.decode(ids) == text
        stream = pieces.decode_stream()
        pushed = [stream.push(i) for i in ids]
        assert "\ufffd" not in "".join(pushed)
        assert "".join(pushed) + stream.flush() == text
    assert not set(pieces.encode("[CLS] </s>")) & {pieces.bos_id, pieces.eos_id}
    with pytest.raises(UserError, match="surrogate"):
        pieces.encode("a\ud800")


def test_sentencepiece_model_in_a_dataset(piece_dir, tmp_path):
    from aquila.data.indexfile import read_index, read_tokens
    from aquila.data.prepare.pipeline import PrepareOptions, make_datasets

    pieces = load_tokenizer(piece_dir)
    (tmp_path / "d.jsonl").write_text('{"text": "the day after Monday"}\n')
    make_datasets(PrepareOptions([str(tmp_path / "d.jsonl")], str(tmp_path / "d")), pieces)
    prefix = tmp_path / "d_text_document"
    tokens = read_tokens(prefix, read_index(prefix)).tolist()
    assert tokens == [pieces.bos_id, *pieces.encode("the day after Monday"), pieces.eos_id]


def test_broken_sentencepiece_model(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
