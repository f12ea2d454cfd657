"""Conversion: bit-identical round trips, logits checked, tokenizer files included, nothing half-written."""

import json
import shutil
import sys
from types import ModuleType

import pytest
import torch

import aquila.convert as convert_module
from aquila.config import ModelConfig
from aquila.convert import DTYPES, main
from aquila.core.errors import UserError
from aquila.model import AquilaModel, gguf, save_weights
from aquila.tokenizer import load_tokenizer

CONFIGS = {
    "plain": {"dim": 64, "n_heads": 4},
    "grouped": {"dim": 96, "n_heads": 6, "n_kv_heads": 2, "rope_theta": 1e6, "norm_eps": 1e-6},
    "one key head": {"dim": 64, "n_heads": 8, "n_kv_heads": 1, "ffn_dim_multiplier": 1.3},
}


@pytest.fixture
def source(tmp_path, root):
    """Makes a checkpoint folder with the tiny model's tokenizer."""

    def make(name="grouped", dtype=torch.float32):
        folder = tmp_path / "source"
        folder.mkdir()
        for file in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            shutil.copyfile(root / "checkpoints_in" / "aquila-tiny" / file, folder / file)
        config = ModelConfig(
            **CONFIGS[name],
            n_layers=2,
            multiple_of=16,
            vocab_size=load_tokenizer(folder).vocab_size,
            max_seq_len=80,
        )
        model = AquilaModel(config, dtype=dtype, seed=3)
        save_weights(model, folder)
        (folder / "config.json").write_text(json.dumps(config.model_dump()))
        return folder, model

    return make


def convert(source, target, to, *options):
    return main(["--input", str(source), "--output", str(target), "--to", to, *options])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_keep_every_bit(source, tmp_path, name, dtype):
    folder, model = source(name, dtype)
    for step, to in enumerate(("hf", "aquila", "aquila", "hf", "hf", "aquila")):
        target = tmp_path / f"{step}-{to}"
        assert convert(folder, target, to, "--max-shard-gb", "0.0002") == 0
        folder = target
        loaded = AquilaModel.from_pretrained(folder, dtype=dtype)
        assert same(loaded, model)
        assert loaded.config.ffn_dim == model.config.ffn_dim
        assert loaded.config.rope_theta == model.config.rope_theta
        assert loaded.config.norm_eps == model.config.norm_eps
    released = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert set(released) == set(model.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_without_remote_code(source, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder, model = source(name)
    convert(folder, tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens = torch.randint(model.config.vocab_size, (2, 80))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == load_tokenizer(folder).eos_id


def test_auto_tokenizer_gives_the_same_ids(source, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = source()
    convert(folder, tmp_path / "hf", "hf")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = ["Three plus four is seven.", " 两个 \n\n  苹果", "a [CLS] b</s><|endoftext|>", "naïve 🙂", ""]
    for text in texts:
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.pad_token_id == ours.pad_id
    assert theirs.decode([ours.bos_id, *ours.encode("hi"), ours.eos_id], skip_special_tokens=True) == "hi"


@pytest.fixture
def with_pieces(source):
    """Makes a checkpoint folder with a SentencePiece model trained with these options."""
    sentencepiece = pytest.importorskip("sentencepiece")

    def make(**options):
        folder, _ = source("plain")
        texts = [f"the day after Monday is Tuesday {i} 星期一的后一天 aaa aa" for i in range(300)]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), vocab_size=330,
            hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            (folder / name).unlink()
        tokenizer = load_tokenizer(folder)
        config = ModelConfig(dim=64, n_heads=4, n_layers=1, vocab_size=tokenizer.vocab_size, max_seq_len=80)
        save_weights(AquilaModel(config, dtype=torch.float32, seed=3), folder)
        (folder / "config.json").write_text(json.dumps(config.model_dump()))
        return folder, tokenizer

    return make


PLAIN_PIECES = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True},
        {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
        {"model_type": "unigram"},
    ],
)
def test_a_sentencepiece_model_keeps_its_ids(with_pieces, tmp_path, capsys, options):
    transformers = pytest.importorskip("transformers")
    folder, ours = with_pieces(**options, **PLAIN_PIECES)
    assert convert(folder, tmp_path / "hf", "hf", "--verify") == 0
    assert "transformers gives the same ids" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("the day", "  two", " x", "星期一 🙂 é\n", "[CLS] </s><s>", ""):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        if options.get("byte_fallback"):
            assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.pad_token_id == ours.pad_id
    convert(tmp_path / "hf", tmp_path / "back", "aquila")
    assert load_tokenizer(tmp_path / "back").fingerprint == ours.fingerprint


def test_a_sentencepiece_model_that_rewrites_its_text_is_refused(with_pieces, tmp_path):
    folder, _ = with_pieces(model_type="bpe", byte_fallback=True, normalization_rule_name="nmt_nfkc")
    with pytest.raises(UserError, match="other ids than those of training"):
        convert(folder, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_verify_fails_on_other_token_ids(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    folder, _ = source("plain")
    whole = convert_module.write_hf

    def spoiled(tokenizer, source, target, length):
        whole(tokenizer, source, target, length)
        path = target / "tokenizer.json"
        content = json.loads(path.read_text())
        content["pre_tokenizer"]["add_prefix_space"] = True
        path.write_text(json.dumps(content))

    monkeypatch.setattr(convert_module, "write_hf", spoiled)
    assert convert(folder, tmp_path / "hf", "hf", "--verify") == 1
    assert "with other token ids" in capsys.readouterr().err


def test_the_tokenizer_survives_every_way(source, tmp_path):
    folder, _ = source()
    convert(folder, tmp_path / "hf", "hf")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (tmp_path / "hf" / name).unlink()  # as in folders that hold tokenizer.json alone
    convert(tmp_path / "hf", tmp_path / "back", "aquila")
    ours, back = load_tokenizer(folder), load_tokenizer(tmp_path / "back")
    assert back.encode("Three plus 四") == ours.encode("Three plus 四")
    assert (back.bos_id, back.eos_id, back.fingerprint) == (ours.bos_id, ours.eos_id, ours.fingerprint)


def test_verify_prints_the_largest_difference(source, tmp_path, capsys):
    folder, _ = source()
    assert convert(folder, tmp_path / "hf", "hf", "--verify") == 0
    assert "largest difference of a logit" in capsys.readouterr().out


GGUF_TYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0"}


@pytest.mark.parametrize("name", CONFIGS)
def test_gguf_holds_the_same_values_under_llama_cpps_names(source, tmp_path, name):
    gguf = pytest.importorskip("gguf")
    folder, model = source(name, torch.bfloat16)
    assert convert(folder, tmp_path / "model.gguf", "gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(model.state_dict())
    for layer in range(2):
        for ours, theirs in (("attention.wk", "attn_k"), ("feed_forward.w2", "ffn_down")):
            expected = model.get_parameter(f"layers.{layer}.{ours}.weight")
            found = tensors[f"blk.{layer}.{theirs}.weight"]
            assert found.tensor_type.name == "BF16"
            assert bytes(found.data) == expected.detach().view(torch.uint8).numpy().tobytes()
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = model.config
    for key, value in (
        ("llama.rope.freq_base", config.rope_theta), ("llama.attention.head_count_kv", config.kv_heads),
        ("llama.feed_forward_length", config.ffn_dim), ("llama.context_length", config.max_seq_len),
        ("llama.attention.layer_norm_rms_epsilon", config.norm_eps),
    ):  # fmt: skip
        assert fields[key] == pytest.approx(value)
    tokenizer = load_tokenizer(folder)
    assert fields["tokenizer.ggml.tokens"][tokenizer.eos_id] == "</s>"
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_id


@pytest.mark.parametrize("dtype", GGUF_TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same(source, tmp_path, capsys, name, dtype):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    from aquila.model.gguf import matrix_dtype
    from aquila.model.llama_cpp import LlamaCpp

    folder, _ = source(name)
    assert convert(folder, tmp_path / "out", "gguf", "--dtype", dtype, "--verify") == 0
    out, file = capsys.readouterr().out, tmp_path / "out" / "model.gguf"
    assert "largest difference of a logit" in out
    assert dtype != "fp32" or "62 of 62 greedy tokens are equal" in out
    assert matrix_dtype(file) == DTYPES[dtype]
    tokenizer = load_tokenizer(folder)
    model = LlamaCpp(file, length=16, threads=1)
    for text in ("Three plus four's 1234  seven.\n\n x", " 两个 \n\n  苹果", "a [CLS] b</s>", "naïve 🙂"):
        assert model.tokenize(text) == [tokenizer.bos_id, *tokenizer.encode(text)]
    model.close()


def test_a_gguf_file_of_other_values_fails_verify(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    folder, _ = source("plain")
    monkeypatch.setitem(gguf._LAYER, "feed_forward.w1.weight", "ffn_up.weight")
    monkeypatch.setitem(gguf._LAYER, "feed_forward.w3.weight", "ffn_gate.weight")
    assert convert(folder, tmp_path / "model.gguf", "gguf", "--verify") == 1
    assert "do not use it" in capsys.readouterr().err


def test_gguf_needs_its_packages_and_its_options_a_gguf(source, tmp_path, monkeypatch):
    folder, _ = source()
    for options in (("--dtype", "q8_0"),):
        with pytest.raises(UserError, match="need --to gguf"):
            convert(folder, tmp_path / "out", "hf", *options)
    with pytest.raises(UserError, match="need --to gguf"):
        convert(folder, tmp_path / "out.gguf", "aquila")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        convert(folder, tmp_path / "out", "gguf", "--verify")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        convert(folder, tmp_path / "out", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_verify_fails_when_the_rotary_layout_is_wrong(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    folder, _ = source("plain")
    monkeypatch.setattr("aquila.model.hf.permute", lambda weight, heads: weight)
    assert convert(folder, tmp_path / "hf", "hf", "--verify") == 1
    assert "do not use it" in capsys.readouterr().err


def test_dtype_is_changed_on_request(source, tmp_path):
    folder, model = source()
    convert(folder, tmp_path / "hf", "hf", "--dtype", "bf16")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = AquilaModel.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert same(loaded, model.bfloat16())


def test_an_existing_output_is_never_touched(source, tmp_path):
    folder, _ = source()
    target = tmp_path / "taken"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(UserError, match="exists already"):
        convert(folder, target, "hf")
    assert [f.name for f in target.iterdir()] == ["precious"]


def test_a_failed_conversion_leaves_nothing(source, tmp_path):
    folder, _ = source()
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a safetensors file"):
        convert(folder, tmp_path / "out", "hf")
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_a_folder_without_tokenizer_says_so(source, tmp_path, capsys):
    folder, _ = source()
    (folder / "vocab.json").unlink()
    assert convert(folder, tmp_path / "out", "aquila") == 0
    assert "holds no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("max_seq_len", "give key=value"),
        ("max_seq_length=64", "unknown key 'max_seq_length'; did you mean 'max_seq_len'"),
        ("rope_scaling={rope_type: yarn}", "rope_scaling.factor"),
        ("max_seq_len=[", "not valid YAML"),
        ("dim=128", "the weights do not fit this config.json"),
    ],
)
def test_wrong_changes_are_named_and_nothing_is_written(source, tmp_path, change, message):
    folder, _ = source("plain")
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "out", "aquila", "--set", change)
    assert not (tmp_path / "out").exists()


def test_scaled_models_are_no_gguf_files_here(source, tmp_path):
    folder, _ = source("plain")
    with pytest.raises(UserError, match="rope_scaling is not written into GGUF"):
        convert(folder, tmp_path / "out", "gguf", "--set", "rope_scaling={rope_type: linear, factor: 2}")
