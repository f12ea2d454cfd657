"""Losses of the validation sets: the same tokens whatever batch size, accumulation and number of ranks."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from aquila.data.batches import evaluation_batches
from aquila.data.indexed import SampleStream
from aquila.tokenizer import Tokenizer
from aquila.training.deepspeed.engine import Engine, MicroBatch

BATCH = 16
"""Samples that one of `eval_iters` stands for."""
SPLIT = "split"
"""Name of the set that `split` leaves for validation, where a name is needed."""


class Scores(NamedTuple):
    """Of one evaluation: nats a counted token, of the split and of each set of `valid_data`."""

    loss: float | None
    losses: dict[str, float]
    bits_per_byte: dict[str, float]
    """Loss in bits over the UTF-8 bytes of the counted tokens; empty without a tokenizer."""

    def record(self) -> dict[str, Any]:
        """The keys of `metrics.jsonl`."""
        record: dict[str, Any] = {}
        if self.loss is not None:
            record["valid_loss"] = self.loss
        if self.losses:
            record["valid_losses"] = self.losses
        if self.bits_per_byte:
            record["valid_bits_per_byte"] = self.bits_per_byte
        return record


@dataclass(frozen=True)
class Evaluator:
    """Evaluates every set on all ranks together.

    sets: the stream of each by name, `SPLIT` for the split's own. samples: of each set, at most; never more
    than one pass. token_bytes: float32 (vocabulary,), UTF-8 bytes of each id, or None.
    """

    engine: Engine
    sets: Mapping[str, SampleStream]
    samples: int
    rank: int
    world_size: int
    micro_batch_size: int
    document_mask: bool
    token_bytes: torch.Tensor | None = None

    def __call__(self) -> Scores:
        """The losses now; nothing of the model or of the training data's order changes."""
        losses, bits = {}, {}
        for name, stream in self.sets.items():
            found = self.engine.evaluate(self._batches(stream), self.token_bytes)
            if found is None:
                continue
            losses[name] = found.loss
            if found.bytes:
                bits[name] = found.loss * found.tokens / (math.log(2) * found.bytes)
        return Scores(losses.pop(SPLIT, None), losses, bits)

    def _batches(self, stream: SampleStream) -> Iterator[MicroBatch]:
        return evaluation_batches(
            stream,
            min(self.samples, stream.samples_per_epoch),
            self.rank,
            self.world_size,
            self.micro_batch_size,
            document_mask=self.document_mask,
            device=self.engine.device,
        )


def token_bytes(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> torch.Tensor:
    """float32 (vocab_size,): UTF-8 bytes of each id; special tokens and ids without text count none."""
    special = set(tokenizer.special_tokens.values())
    lengths = [
        len(tokenizer.token_bytes(token)) if token < tokenizer.vocab_size and token not in special else 0
        for token in range(vocab_size)
    ]
    return torch.tensor(lengths, dtype=torch.float32, device=device)
