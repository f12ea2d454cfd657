"""Scaled rotary embedding against transformers: the same logits and gradients, short, at the edge and far."""

import json

import pytest
import torch

from aquila.config import ModelConfig
from aquila.convert import main
from aquila.generation.cache import RowCache
from aquila.generation.decode_step import DecodeStep
from aquila.model import AquilaModel, hf, save_weights

transformers = pytest.importorskip("transformers")
ORIGINAL, LONGEST = 64, 256
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
KINDS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn": YARN,
    "yarn, all keys": {
        **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False,
    },
    "yarn, attention": {**YARN, "attention_factor": 1.3},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": ORIGINAL,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


def config_of(kind: str) -> ModelConfig:
    sizes = {"dim": 96, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "vocab_size": 400}
    return ModelConfig(
        **sizes, max_seq_len=LONGEST, rope_theta=5e4, rope_scaling=KINDS[kind], initializer_range=0.05
    )


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """Ours, and theirs loaded from our conversion."""
    ours = AquilaModel(config_of(request.param), seed=9)
    save_weights(ours, tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(ours.config.model_dump_json(exclude_defaults=True))
    main(["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "theirs"), "--to", "hf"])
    return ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)


@torch.no_grad()
def test_logits_are_equal_at_every_length(pair) -> None:
    ours, theirs = pair
    plain = AquilaModel(ours.config.model_copy(update={"rope_scaling": None}), seed=9)
    for seq in (1, 7, ORIGINAL, ORIGINAL + 1, LONGEST, 1000):
        tokens = torch.randint(400, (1, seq), generator=torch.Generator().manual_seed(seq))
        logits = ours(tokens)
        assert (logits - theirs(tokens).logits).abs().max() < 1e-5
    assert (logits - plain(tokens)).abs().max() > 1e-2  # the scaling does something


def test_gradients_are_equal(pair) -> None:
    ours, theirs = pair
    tokens = torch.randint(400, (2, 129), generator=torch.Generator().manual_seed(3))
    ours(tokens[:, :-1], labels=tokens[:, 1:]).backward()
    # Their own labels would make the sequence one token longer, which dynamic scaling feels.
    logits = theirs(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    heads = hf.permuted(ours.config)
    by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        wanted = by_name[hf.from_released(name)].grad
        if hf.short(name) in heads:
            wanted = hf.unpermute(wanted, heads[hf.short(name)])
        assert (parameter.grad - wanted).abs().max() < 1e-5, name


@torch.no_grad()
def test_generation_is_equal_whatever_the_neighbours(pair) -> None:
    """With a cache, token by token, across the edge of the original context; a longer row beside it."""
    ours, theirs = pair
    prompt = torch.randint(400, (1, ORIGINAL - 8), generator=torch.Generator().manual_seed(5))
    wanted = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0
    )[0, prompt.shape[1] :].tolist()
    longer = torch.randint(400, (1, ORIGINAL + 40), generator=torch.Generator().manual_seed(6))
    for prompts in ([prompt], [prompt, longer]):
        cache = RowCache(ours.config, 2, LONGEST, torch.device("cpu"), torch.float32)
        latest = []
        for row in prompts:
            entering = cache.enter(1, row.shape[1])
            latest.append(ours.output(ours.hidden(row, cache=entering)[:, -1]).argmax(-1))
            entering.done()
        step, found = DecodeStep(ours), [int(latest[0])]
        tokens = torch.cat(latest)
        while len(found) < 24:
            tokens = step(tokens, cache).argmax(-1)
            found.append(int(tokens[0]))
        assert found == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_go_there_and_back(tmp_path, kind) -> None:
    """Also through what transformers itself writes, which is `rope_parameters`."""
    config = config_of(kind)
    theirs = hf.config_to_hf(config, "float32")
    assert hf.config_from_hf(theirs, "config.json").function() == config.function()
    assert hf.config_from_hf(theirs, "config.json").max_seq_len == LONGEST
    transformers.LlamaConfig(**{k: v for k, v in theirs.items() if k != "torch_dtype"}).save_pretrained(
        tmp_path
    )
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    back = hf.config_from_hf(written, "config.json")
    assert (back.function(), back.max_seq_len) == (config.function(), LONGEST)
