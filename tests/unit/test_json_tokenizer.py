"""Other models' tokenizer.json: the ids of transformers, their own marks around a document, and back."""

import json
import shutil

import pytest
import torch

from aquila.config import ModelConfig
from aquila.convert import main
from aquila.core.errors import UserError
from aquila.model import AquilaModel, save_weights
from aquila.model.hf_sentencepiece import from_pieces
from aquila.tokenizer import JsonTokenizer, SentencePieceTokenizer, has_tokenizer, load_tokenizer

TEXTS = (
    "Hello, world! I'm 12345 years  old", " x", "", "\tif (a <= 10):\n\n    return '½'\r\n",
    "将进酒，杯莫停。🙂 é",
    "a <|begin_of_text|> <|end_of_text|> <s> </s> b", "  ", "x ",
)  # fmt: skip
SENTENCES = [f"the day after Monday is Tuesday {i} 星期一的后一天 aaa aa" for i in range(300)]
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(folder) -> None:
    """As Llama 3: digits in threes, marks behind the vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    whole = Tokenizer(models.BPE(ignore_merges=True))
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    whole.train_from_iterator(SENTENCES, trainer)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_0|>")
    whole.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    whole.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": names[0], "eos_token": {"content": names[1], "__type": "AddedToken"}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def pieces(folder) -> None:
    """As Llama 2: a space before every text, bytes for what is unknown, marks at the beginning."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        hard_vocab_limit=False, minloglevel=2, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    content = json.loads(from_pieces(SentencePieceTokenizer(folder)).to_str())
    names = ("<unk>", "<s>", "</s>")
    by_id = {index: token for token, index in content["model"]["vocab"].items()} | dict(enumerate(names))
    content["model"]["vocab"] = {token: index for index, token in by_id.items()}
    content["added_tokens"] = [
        {"id": index, "content": name, "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for index, name in enumerate(names)
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
    )


@pytest.fixture(params=[byte_level, pieces], ids=lambda make: make.__name__)
def folder(request, tmp_path):
    """A Hugging Face folder with a model's weights and its tokenizer."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    request.param(folder)
    size = load_tokenizer(folder).vocab_size
    config = ModelConfig(dim=32, n_heads=4, n_layers=1, multiple_of=8, vocab_size=size, max_seq_len=64)
    save_weights(AquilaModel(config, seed=1), folder)
    (folder / "config.json").write_text(json.dumps(config.model_dump()))
    return folder


def test_ids_and_texts_are_those_of_transformers(folder) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, JsonTokenizer)
    assert has_tokenizer(folder)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.eos_token_id,
    )
    assert ours.vocab_size == len(theirs)
    tokens, lengths = ours.encode_documents(["the day", ""])
    assert tokens.tolist() == [ours.bos_id, *ours.encode("the day"), ours.eos_id, ours.bos_id, ours.eos_id]
    assert lengths.tolist() == [len(tokens) - 2, 2]
    special = theirs.bos_token + theirs.decode(ours.encode("the day"))
    assert ours.encode(special, allow_special=True)[0] == ours.bos_id
    assert ours.decode([ours.bos_id, *ours.encode("day")]) == "day"


def test_it_goes_in_and_out_as_it_is(folder, tmp_path, capsys) -> None:
    pytest.importorskip("transformers")
    for source, target, to in (("theirs", "hf", "hf"), ("hf", "ours", "aquila"), ("ours", "again", "hf")):
        words = [
            "--input",
            str(tmp_path / source),
            "--output",
            str(tmp_path / target),
            "--to",
            to,
            "--verify",
        ]
        assert main(words) == 0
        assert load_tokenizer(tmp_path / target).fingerprint == load_tokenizer(folder).fingerprint
        assert "gives the same ids for" in capsys.readouterr().out
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["bos_token_id"] == load_tokenizer(folder).bos_id
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (tmp_path / "ours" / "tokenizer.model").exists()
    with pytest.raises(UserError, match="is not written into GGUF"):
        main(["--input", str(folder), "--output", str(tmp_path / "x.gguf"), "--to", "gguf"])


def test_a_space_is_decoded_where_it_stood(folder) -> None:
    tokenizer = load_tokenizer(folder)
    stream = tokenizer.decode_stream()
    text = " two  days\n"
    assert "".join(map(stream.push, tokenizer.encode(text))) + stream.flush() == text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c, m: m.pop("bos_token"), "bos_token must be named in tokenizer_config.json or"),
        (lambda c, m: m.update(eos_token="<none>"), "eos_token must be named .* it is not '<none>' of the"),
        (lambda c, m: c.update(decoder=None), "decodes by BPE and \\[\\]"),
        (lambda c, m: c.update(model={"type": "BPE"}), "not a tokenizer"),
    ],
)
def test_mistakes_are_named(tmp_path, spoil, message) -> None:
    byte_level(tmp_path)
    paths = [tmp_path / name for name in ("tokenizer.json", "tokenizer_config.json")]
    contents = [json.loads(path.read_text()) for path in paths]
    spoil(*contents)
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
    paths[0].write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_half_a_character_is_refused(tmp_path) -> None:
    byte_level(tmp_path)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        load_tokenizer(tmp_path).encode("a\ud83d")


def test_aquilas_own_files_count_beside_a_tokenizer_json(tmp_path, root) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(root / "checkpoints_in" / "aquila-tiny" / name, tmp_path)
    before = load_tokenizer(tmp_path).fingerprint
    byte_level(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == before
    assert torch.tensor(load_tokenizer(tmp_path).encode("the")).numel() > 0
