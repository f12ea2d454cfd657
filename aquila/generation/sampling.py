"""How the next token is chosen from the logits.

The order is the original predictor's (FlagAI `flagai/model/predictor/aquila.py`): temperature, top-k,
softmax, top-p, one draw. Everything is computed in fp32, whatever the model's dtype.
"""

from dataclasses import dataclass

import torch

from aquila.core.errors import UserError

_COLDEST = 1e-6
"""Below this temperature fp32 holds no second likeliest token: it is greedy, as 0 is."""


@dataclass(frozen=True)
class Sampling:
    """The choices of one request; the defaults are the original's."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    """0 takes the likeliest token (greedy)."""
    top_k: int = 30
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the likeliest tokens until their probabilities pass p; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already in the context lose (CTRL, arXiv 1909.05858, section 4.1); 1 is off."""
    seed: int | None = None
    """The same seed gives the same tokens; None draws one."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""

    def __post_init__(self) -> None:
        """Raises `UserError` for a value outside its range."""
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "repetition_penalty": (1e-3 <= self.repetition_penalty <= 1e9, "0.001 to 1e9 (1 is off)"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "0 or more, below 2^63"),
            "stop": (all(self.stop), "strings of at least one character"),
        }
        for name, (good, rule) in checks.items():
            if not good:
                raise UserError(f"{name.replace('_', '-')} must be {rule} (got {getattr(self, name)})")


def penalize(logits: torch.Tensor, context: torch.Tensor, penalty: float) -> torch.Tensor:
    """`logits` (vocabulary,) with every token of `context` (n,) made less likely.

    A positive logit is divided by the penalty, a negative one multiplied.
    """
    seen = logits[context]
    return logits.scatter(0, context, torch.where(seen > 0, seen / penalty, seen * penalty))


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """One token from `logits` (vocabulary,) fp32.

    Top-k keeps whatever ties with the k-th value; top-p keeps a token when the probability of all
    likelier ones is at most p, so the likeliest always stays.
    """
    if sampling.temperature < _COLDEST:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        # Sorting only the kept candidates instead of the whole vocabulary changes no result: the
        # rest has probability zero. Ties with the k-th value are kept, as the original keeps them.
        floor = torch.topk(logits, sampling.top_k).values[-1]
        kept = (logits >= floor).nonzero().squeeze(-1)
        values, order = torch.sort(logits[kept], descending=True, stable=True)
        ids = kept[order]
    else:
        values, ids = torch.sort(logits, descending=True, stable=True)
    probabilities = torch.softmax(values, dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    probabilities[before > sampling.top_p] = 0.0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
