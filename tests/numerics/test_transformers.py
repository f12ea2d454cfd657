"""The package against transformers' Llama on shared weights: logits, gradients, greedy text, both ways."""

import json

import pytest
import torch

from aquila.config import ModelConfig
from aquila.convert import main
from aquila.model import AquilaModel, KVCache, hf, save_weights

transformers = pytest.importorskip("transformers")
SHAPES = {
    "plain": {"dim": 64, "n_heads": 4},
    "grouped": {"dim": 96, "n_heads": 8, "n_kv_heads": 2, "rope_theta": 1e6, "ffn_dim_multiplier": 1.3},
}


@pytest.fixture(params=SHAPES)
def pair(request, tmp_path):
    """Ours, and theirs loaded from our conversion."""
    config = ModelConfig(
        **SHAPES[request.param], n_layers=3, multiple_of=16, vocab_size=400, max_seq_len=256, norm_eps=1e-5
    )
    ours = AquilaModel(config, seed=9)
    save_weights(ours, tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config.model_dump()))
    main(["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "theirs"), "--to", "hf"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    return ours, theirs


@pytest.mark.parametrize("seq", [1, 2, 31, 256])
def test_logits_are_equal(pair, seq):
    ours, theirs = pair
    tokens = torch.randint(400, (2, seq), generator=torch.Generator().manual_seed(seq))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_loss_and_gradients_are_equal(pair):
    ours, theirs = pair
    tokens = torch.randint(400, (2, 65), generator=torch.Generator().manual_seed(3))
    loss = ours(tokens[:, :-1], labels=tokens[:, 1:])
    loss.backward()
    other = theirs(tokens, labels=tokens).loss
    other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    heads = hf.permuted(ours.config)
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        wanted = theirs_by_name[hf.from_released(name)].grad
        if hf.short(name) in heads:
            wanted = hf.unpermute(wanted, heads[hf.short(name)])
        assert parameter.grad.norm().item() == pytest.approx(wanted.norm().item(), rel=1e-4)
        assert (parameter.grad - wanted).abs().max() < 1e-5


def test_greedy_text_is_identical(pair):
    ours, theirs = pair
    prompt = torch.tensor([[5, 77, 312, 8]])
    wanted = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    cache, ids, fresh = KVCache(ours.config, 1, 64), prompt, prompt
    with torch.no_grad():
        for _ in range(40):
            fresh = ours(fresh, cache=cache)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, fresh), dim=1)
    assert ids.tolist() == wanted.tolist()


def test_a_model_made_by_transformers_loads_here(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=90,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    ours = AquilaModel.from_pretrained(tmp_path)
    tokens = torch.randint(90, (1, 20))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-5
