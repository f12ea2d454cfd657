"""Decoding: the cache changes no token, neither does company in a batch, and every answer ends rightly."""

import json

import pytest
import torch

from aquila.core.errors import UserError
from aquila.generation import generate
from aquila.generation.decode import Decoder, window
from aquila.generation.sampling import Sampling
from aquila.model import AquilaModel, KVCache
from tests.unit.generation.models import small_model, tokens

KINDS = ("fused", "triangle", "reference")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_original_to_the_token(shared_dir, kind, use_cache):
    folder = shared_dir / "data" / "golden" / "aquila-nano"
    golden = json.loads((folder / "greedy.json").read_text())
    prompt, expected = golden["prompt_ids"], golden["greedy_ids"]
    model = AquilaModel.from_pretrained(folder, attention=kind)
    new = generate(model, [prompt], max_new_tokens=24, temperature=0.0, use_cache=use_cache)
    assert prompt + new[0] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_the_cache_changes_no_token(kind, kv_heads):
    model = small_model(kind, n_kv_heads=kv_heads)
    prompts = [tokens(length, seed=length) for length in (1, 2, 9, 31)]
    cached = generate(model, prompts, max_new_tokens=30, temperature=0.0)
    plain = generate(model, prompts, max_new_tokens=30, temperature=0.0, use_cache=False)
    assert cached == plain
    assert len({token for new in cached for token in new}) > 10  # a model that repeats itself tests nothing


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_step_gives_the_models_logits(kv_heads):
    """The fused one-token step is the model's own function, for rows of one and of unequal length."""
    model = small_model(n_kv_heads=kv_heads)
    decoder = Decoder(model, 3)
    decoder.admit([decoder.sequence(tokens(n, seed=n), Sampling(20, 0.0)) for n in (5, 12, 12)])
    for _ in range(3):
        latest = torch.tensor([sequence.tokens[-1] for sequence in decoder.active])
        contexts = [list(sequence.tokens) for sequence in decoder.active]
        lengths = list(decoder._cache.lengths)
        logits = decoder._step(latest, decoder._cache)
        for row, context in enumerate(contexts):
            torch.testing.assert_close(
                logits[row], model(torch.tensor([context]))[0, -1], atol=2e-5, rtol=1e-4
            )
        decoder._cache.lengths = lengths
        decoder.step()


def test_fusing_leaves_the_model_whole():
    model = small_model()
    batch = torch.tensor([tokens(10)])
    before, names = model(batch), [name for name, _ in model.named_parameters()]
    wq = model.layers[0].attention.wq.weight.clone()
    generate(model, [tokens(4)], max_new_tokens=4, temperature=0.0)
    generate(model, [tokens(4)], max_new_tokens=4, temperature=0.0)
    assert torch.equal(model(batch), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model.layers[0].attention.wq.weight, wq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_in_a_batch_gets_what_it_gets_alone(temperature, dtype):
    model = small_model().to(dtype)
    prompts = [tokens(length, seed=length) for length in (3, 17, 8, 8, 1, 30)]
    settings = {"max_new_tokens": 25, "temperature": temperature, "seed": 11, "top_k": 0, "top_p": 1.0}
    together = generate(model, prompts, **settings)
    assert together == [generate(model, [prompt], **settings)[0] for prompt in prompts]
    # More prompts than rows: the others enter as rows become free.
    assert together == generate(model, prompts, rows=2, **settings)


def test_the_same_seed_gives_the_same_tokens():
    model = small_model()
    prompt = [tokens(6)]
    first = generate(model, prompt, max_new_tokens=20, temperature=1.0, seed=5)
    assert first == generate(model, prompt, max_new_tokens=20, temperature=1.0, seed=5)
    assert first != generate(model, prompt, max_new_tokens=20, temperature=1.0, seed=6)


def test_ends_before_a_stop_token():
    model = small_model()
    new = generate(model, [tokens(6)], max_new_tokens=20, temperature=0.0)[0]
    stop = new[7]
    expected = new[: new.index(stop)]
    assert generate(model, [tokens(6)], max_new_tokens=20, temperature=0.0, stop_ids={stop})[0] == expected


def test_ends_at_the_context_and_says_so():
    model = small_model(max_seq_len=16)
    decoder = Decoder(model, 1)
    sequence = decoder.sequence(tokens(10), Sampling(50, 0.0))
    list(decoder.run([sequence]))
    assert (len(sequence.tokens), sequence.finish_reason) == (16, "context")


@pytest.mark.parametrize("length", [3, 15, 16, 40])
def test_sliding_goes_on_and_the_cache_changes_nothing(length):
    model = small_model(max_seq_len=16)
    settings = {"max_new_tokens": 40, "temperature": 0.0, "sliding": True}
    prompts = [tokens(length), tokens(5, seed=2)]
    cached = generate(model, prompts, **settings)
    assert [len(new) for new in cached] == [40, 40]
    assert cached == generate(model, prompts, use_cache=False, **settings)


def test_window_keeps_the_first_token_and_the_latest():
    assert window(list(range(15)), 16) == list(range(15))
    for count in range(16, 60):
        seen = window(list(range(count)), 16)
        assert seen[0] == 0
        assert seen[-1] == count - 1
        assert seen[1:] == list(range(seen[1], count))
        assert 7 <= len(seen) < 16


def test_no_new_tokens():
    assert generate(small_model(), [tokens(4)], max_new_tokens=0) == [[]]
    assert generate(small_model(), []) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([300], "vocabulary"), ([-1], "vocabulary"), (tokens(64), "context holds 64")],
)
def test_a_prompt_that_cannot_be_is_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        generate(small_model(), [prompt], max_new_tokens=4)


def test_repetition_penalty_in_greedy():
    model = small_model()
    new = generate(model, [tokens(3)], max_new_tokens=40, temperature=0.0, repetition_penalty=1e9)[0]
    positive = [token for token in new if new.count(token) > 1]
    assert not positive


def test_a_dropped_sequence_leaves_the_others_alone():
    model = small_model()
    decoder = Decoder(model, 3)
    expected = generate(model, [tokens(9, 2)], max_new_tokens=12, temperature=0.0)[0]
    first, second, third = (
        decoder.sequence(tokens(n, seed), Sampling(12, 0.0)) for n, seed in ((4, 1), (9, 2), (7, 3))
    )
    decoder.admit([first, second, third])
    decoder.step()
    decoder.drop(first)
    while decoder.active:
        decoder.step()
    assert second.new_tokens == expected
    assert first.finish_reason == "dropped"
    assert len(first.new_tokens) == 2


def test_kv_cache_prefill_matches_row_cache():
    """Rows hold exactly what the model's own cache holds."""
    model = small_model(n_kv_heads=3)
    prompt = tokens(11)
    cache = KVCache(model.config, 1, 11)
    model.hidden(torch.tensor([prompt]), cache=cache)
    decoder = Decoder(model, 2)
    decoder.admit([decoder.sequence(prompt, Sampling(3, 0.0)), decoder.sequence(tokens(6), Sampling(3, 0.0))])
    row = next(i for i, sequence in enumerate(decoder.active) if sequence.tokens[:11] == prompt)
    keys = decoder._cache.kv[:, row, :3, :11].transpose(1, 2)
    torch.testing.assert_close(keys, cache.keys[:, 0], atol=1e-6, rtol=1e-5)
