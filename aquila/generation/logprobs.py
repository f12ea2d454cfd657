"""Log probabilities of tokens that are there already, in the form of the OpenAI protocol."""

from typing import Any

import torch

from aquila.model import AquilaModel
from aquila.tokenizer import Tokenizer

_POSITIONS = 256
"""Positions whose logits are in memory at once."""


@torch.inference_mode()
def token_logprobs(model: AquilaModel, tokens: list[int], top: int) -> list[tuple[float, dict[int, float]]]:
    """For each token but the first, given those before it: its log probability, and the `top` likeliest."""
    if len(tokens) < 2:
        return []
    device = model.tok_embeddings.weight.device
    ids = torch.tensor(tokens, device=device)
    hidden = model.hidden(ids[None, :-1])[0]
    found: list[tuple[float, dict[int, float]]] = []
    for part, labels in zip(hidden.split(_POSITIONS), ids[1:].split(_POSITIONS), strict=True):
        logs = model.output(part[None])[0].float().log_softmax(-1)
        own = logs.gather(1, labels[:, None])[:, 0].tolist()
        values, places = (side.tolist() for side in logs.topk(max(top, 1)))
        best = (dict(zip(at, log, strict=True)) for at, log in zip(places, values, strict=True))
        found += [(one, likeliest if top else {}) for one, likeliest in zip(own, best, strict=True)]
    return found


def completion_logprobs(
    model: AquilaModel, tokenizer: Tokenizer, tokens: list[int], first: int, top: int
) -> dict[str, Any]:
    """The `logprobs` of a completion that shows `tokens[first:]`; those before are given, and shown nowhere.

    `top_logprobs` names tokens by their text: of two that look alike the likelier stays. Nothing is known of
    the very first token of all.
    """
    scores: list[tuple[float | None, dict[int, float] | None]] = [(None, None)]
    scores += token_logprobs(model, tokens, top)
    texts = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens[first:]]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [own for own, _ in scores[first:]],
        "top_logprobs": [None if best is None else _by_text(tokenizer, best) for _, best in scores[first:]],
        "text_offset": offsets[:-1],
    }


def _by_text(tokenizer: Tokenizer, best: dict[int, float]) -> dict[str, float]:
    named: dict[str, float] = {}
    for token, log in best.items():
        name = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
        named.setdefault(name.decode("utf-8", "replace"), log)
    return named
