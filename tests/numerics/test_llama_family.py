"""Models that transformers makes, in and out: Llama 2 and 3, Mistral, tied embeddings, odd heads."""

import json

import pytest
import torch

from aquila.convert import main
from aquila.core.errors import UserError
from aquila.generation import generate
from aquila.model import AquilaModel, hf

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "rope_theta": 5e5,
}  # fmt: skip
FAMILY = {
    "llama 2": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama 3.1": ("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3}),
    "llama 3.2, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "wide heads": ("Llama", {"head_dim": 32}),
    "narrow heads": ("Llama", {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral, a window of the whole context": ("Mistral", {"sliding_window": 128}),
}


@pytest.fixture(params=FAMILY)
def theirs(request, tmp_path):
    """A model of transformers, saved in `theirs`."""
    kind, keys = FAMILY[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **keys})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "theirs")
    return model


def test_they_compute_the_same_in_and_out(theirs, tmp_path) -> None:
    tokens = torch.randint(90, (2, 100), generator=torch.Generator().manual_seed(1))
    ours = AquilaModel.from_pretrained(tmp_path / "theirs")
    assert (ours.output.weight is ours.tok_embeddings.weight) == theirs.config.tie_word_embeddings
    with torch.no_grad():
        wanted = theirs(tokens).logits
        assert (ours(tokens) - wanted).abs().max() < 1e-5
    for source, target, to in (("theirs", "ours", "aquila"), ("ours", "back", "hf")):
        assert (
            main(
                [
                    "--input",
                    str(tmp_path / source),
                    "--output",
                    str(tmp_path / target),
                    "--to",
                    to,
                    "--verify",
                ]
            )
            == 0
        )
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert ours.parameter_count() == ours.config.parameter_count() == theirs.num_parameters()


def test_gradients_and_greedy_text_are_the_same(theirs, tmp_path) -> None:
    ours = AquilaModel.from_pretrained(tmp_path / "theirs")
    tokens = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(2))
    ours(tokens[:, :-1], labels=tokens[:, 1:]).backward()
    theirs(tokens, labels=tokens).loss.backward()
    heads, by_name = hf.permuted(ours.config), dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        wanted = by_name[hf.from_released(name)].grad
        if hf.short(name) in heads:
            wanted = hf.unpermute(wanted, heads[hf.short(name)])
        assert (parameter.grad - wanted).abs().max() < 1e-5, name
    prompt = tokens[:1, :7]
    text = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, min_new_tokens=20, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert generate(ours, prompt.tolist(), 20, temperature=0) == [text[0, 7:].tolist()]


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": 64},
        {},
        {"num_key_value_heads": 2, "sliding_window": 4096, "max_position_embeddings": 8192},
    ],
)
def test_a_window_is_refused_also_where_the_file_leaves_it_to_the_default(keys) -> None:
    values = {**SIZES, "max_position_embeddings": 8192, "model_type": "mistral", **keys}
    with pytest.raises(UserError, match="sliding_window"):
        hf.config_from_hf(values, "config.json")


def test_tied_embeddings_can_be_untied_on_the_way(tmp_path) -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "theirs")
    words = [
        "--output",
        str(tmp_path / "ours"),
        "--to",
        "aquila",
        "--set",
        "tied_embeddings=false",
        "--verify",
    ]
    assert main(["--input", str(tmp_path / "theirs"), *words]) == 0
    ours = AquilaModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours.output.weight, ours.tok_embeddings.weight)
    assert ours.output.weight is not ours.tok_embeddings.weight
    words = ["--output", str(tmp_path / "tied"), "--to", "aquila", "--set", "tied_embeddings=true"]
    with pytest.raises(UserError, match=r"unexpected: output\.weight"):
        main(["--input", str(tmp_path / "ours"), *words])
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tied_embeddings"] is False
