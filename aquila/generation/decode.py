"""From prompts to new tokens: prefill, steps over a changing set of rows, and the reasons to end."""

import itertools
import secrets
from collections.abc import Iterator

import torch
from torch import Tensor

from aquila.core.errors import UserError
from aquila.generation.cache import RowCache
from aquila.generation.decode_step import DecodeStep
from aquila.generation.sampling import Sampling, draw, penalize
from aquila.model import AquilaModel

# More tokens at once are no faster, and their activations no longer fit the processor's caches.
_PREFILL_TOKENS = 4096


class Sequence:
    """One prompt and its answer, as tokens. `finish_reason`: stop, length, context, or None while open."""

    def __init__(self, prompt: list[int], sampling: Sampling):
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.sampling = sampling
        self.seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
        # Each sequence draws from its own generator: its neighbours in a batch change nothing.
        self.generator = torch.Generator().manual_seed(self.seed)
        self.finish_reason: str | None = None
        self.end_token: int | None = None
        """The token that ended it, which is no part of it."""

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]


def window(tokens: list[int], size: int) -> list[int]:
    """What the model sees of `tokens` when its context of `size` slides.

    All of them while they fit; after that the first token ([CLS]) and the latest, dropped half a window at
    a time, so that the cache is computed anew once in half a window and not for every token.
    """
    if len(tokens) < size:
        return tokens
    half = max(size // 2, 1)
    dropped = -(-(len(tokens) - size + 1) // half) * half
    return [tokens[0], *tokens[dropped + 1 :]]


class Decoder:
    """Answers sequences in up to `rows` rows at once; rows enter and leave at any step.

    `stop_ids` end an answer and are not part of it. At the end of the model's context an answer ends with
    reason "context", unless `sliding`. `use_cache=False` computes everything anew for every token: slow, and
    the definition that the cache is tested against.
    """

    def __init__(
        self,
        model: AquilaModel,
        rows: int,
        *,
        max_length: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
        sliding: bool = False,
        use_cache: bool = True,
    ):
        config = model.config
        weight = model.tok_embeddings.weight
        self.model, self.rows, self.stop_ids, self.sliding = model, rows, stop_ids, sliding
        self.device, self.dtype = weight.device, weight.dtype
        self.context = config.max_seq_len
        self.max_length = min(max_length or self.context, self.context)
        self.active: list[Sequence] = []
        self._step = DecodeStep(model) if use_cache else None
        self._cache: RowCache | None = None

    def sequence(self, prompt: list[int], sampling: Sampling) -> Sequence:
        """A new sequence. Raises `UserError` for a prompt that the model cannot take."""
        if not prompt:
            raise UserError("the prompt is empty: give at least one token")
        if (top := max(prompt)) >= self.model.config.vocab_size or min(prompt) < 0:
            raise UserError(
                f"token {top if top > 0 else min(prompt)} is not in the model's vocabulary of "
                f"{self.model.config.vocab_size}: are tokenizer and model of one kind?"
            )
        if len(prompt) >= self.context and not self.sliding:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model's context holds {self.context}, answer "
                "included; shorten the prompt, or let the window slide (--sliding)"
            )
        return Sequence(prompt, sampling)

    def run(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, int | None]]:
        """Answers all `sequences`, as many at once as there are rows; yields (sequence, new token).

        The token is None when a sequence ends without one. A sequence's last item has its `finish_reason`
        set. Sequences dropped meanwhile end silently.
        """
        waiting = list(sequences)
        while waiting or self.active:
            free = self.rows - len(self.active)
            entering, waiting = waiting[:free], waiting[free:]
            entering = [sequence for sequence in entering if sequence.finish_reason is None]
            yield from self.admit(entering) if entering else self.step()

    @torch.inference_mode()
    def admit(self, sequences: list[Sequence]) -> list[tuple[Sequence, int | None]]:
        """Prefills new sequences and gives each its first token."""
        assert len(self.active) + len(sequences) <= self.rows
        events = []
        for sequence in sequences:
            if sequence.sampling.max_new_tokens == 0:
                sequence.finish_reason = "length"
                events.append((sequence, None))
        entering = [sequence for sequence in sequences if sequence.finish_reason is None]
        for group in self._alike(entering):
            logits = self._prefill(group)
            self.active += group
            events += self._choose(group, logits)
        return events

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, int | None]]:
        """One more token for every active sequence."""
        if not self.active:
            return []
        if self._step is None:
            group = list(self.active)
            return self._choose(group, torch.cat([self._whole(sequence) for sequence in group]))
        full = [sequence for sequence in self.active if self._is_full(sequence)]
        events = []
        for sequence in full:  # only when sliding: compute the window anew
            self._leave(sequence)
        if self.active:
            group = list(self.active)
            tokens = torch.tensor([sequence.tokens[-1] for sequence in group], device=self.device)
            events += self._choose(group, self._step(tokens, self._cache))
        if full:
            events += self.admit(full)
        return events

    @torch.inference_mode()
    def drop(self, sequence: Sequence) -> None:
        """Ends a sequence before its time; one that has ended is left as it is."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "dropped"
        if sequence in self.active:
            self._leave(sequence)

    def _is_full(self, sequence: Sequence) -> bool:
        return self._cache.lengths[self.active.index(sequence)] + 1 >= self.context

    def _seen(self, sequence: Sequence) -> list[int]:
        return window(sequence.tokens, self.context) if self.sliding else sequence.tokens

    def _alike(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """Groups to prefill together: of one length, and of at most `_PREFILL_TOKENS` tokens.

        Padding would save calls, but attention over padded places rounds another way, so that in bf16 an
        answer would depend on its neighbours.
        """

        def length(sequence: Sequence) -> int:
            return len(self._seen(sequence))

        for size, alike in itertools.groupby(sorted(sequences, key=length), key=length):
            together = max(_PREFILL_TOKENS // size, 1)
            while group := list(itertools.islice(alike, together)):
                yield group

    def _prefill(self, group: list[Sequence]) -> Tensor:
        """Logits (n, V) after each prompt of `group`, which are of one length."""
        if self._step is None:
            return torch.cat([self._whole(sequence) for sequence in group])
        prompts = torch.tensor([self._seen(sequence) for sequence in group], device=self.device)
        self._make_room(prompts.shape[1])
        entering = self._cache.enter(len(group), prompts.shape[1])
        hidden = self.model.hidden(prompts, cache=entering)
        entering.done()
        return self.model.output(hidden[:, -1])

    def _make_room(self, length: int) -> None:
        if self._cache is None:
            limit = self.context if self.sliding else self.max_length
            size = max(limit, length)
            self._cache = RowCache(self.model.config, self.rows, size, self.device, self.dtype)

    def _whole(self, sequence: Sequence) -> Tensor:
        """Logits (1, V) without any cache."""
        tokens = torch.tensor([self._seen(sequence)], device=self.device)
        return self.model.output(self.model.hidden(tokens)[:, -1])

    def _choose(self, group: list[Sequence], logits: Tensor) -> list[tuple[Sequence, int | None]]:
        """A token for each sequence from its row of `logits` (n, V); ended sequences leave."""
        # The draw is done on the CPU, so that a seed means the same on every device.
        logits = logits.float().cpu()
        greedy = logits.argmax(-1).tolist()
        events = []
        for row, sequence in enumerate(group):
            try:
                token = self._drawn(sequence, logits[row], greedy[row])
            except RuntimeError:  # its own numbers have no likeliest token: that ends it alone
                sequence.finish_reason = "error"
                self._leave(sequence)
                events.append((sequence, None))
                continue
            events.append((sequence, self._take(sequence, token)))
        return events

    @staticmethod
    def _drawn(sequence: Sequence, values: Tensor, greedy: int) -> int:
        sampling = sequence.sampling
        if sampling.temperature == 0 and sampling.repetition_penalty == 1:
            return greedy
        if sampling.repetition_penalty != 1:
            values = penalize(values, torch.tensor(sequence.tokens), sampling.repetition_penalty)
        return draw(values, sampling, sequence.generator)

    def _take(self, sequence: Sequence, token: int) -> int | None:
        """Adds a token to its sequence, unless it is a stop token; sets the reason when it was the last."""
        if token in self.stop_ids:
            sequence.finish_reason, sequence.end_token = "stop", token
        else:
            sequence.tokens.append(token)
            if len(sequence.tokens) - sequence.prompt_length >= sequence.sampling.max_new_tokens:
                sequence.finish_reason = "length"
            elif len(sequence.tokens) >= self.context and not self.sliding:
                sequence.finish_reason = "context"
        if sequence.finish_reason is not None:
            self._leave(sequence)
        return None if token in self.stop_ids else token

    def _leave(self, sequence: Sequence) -> None:
        row = self.active.index(sequence)
        if self._step is not None:
            self._cache.remove(row)
        self.active[row] = self.active[-1]
        self.active.pop()


def generate(
    model: AquilaModel,
    prompts: list[list[int]],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 30,
    top_p: float = 0.95,
    *,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: frozenset[int] | set[int] = frozenset(),
    rows: int = 16,
    sliding: bool = False,
    use_cache: bool = True,
) -> list[list[int]]:
    """New tokens for each of `prompts` (token ids, of any lengths); the defaults are the original's.

    `temperature=0` is greedy. A prompt in a batch gets what it gets alone: with a `seed`, each prompt draws
    from a generator of its own started there. (In bf16 a library's matrix product may still round
    the odd element by the number of rows.) An answer ends before a token of `stop_ids`, after
    `max_new_tokens`, or when the model's context is full (unless `sliding`). Raises `UserError` for a
    prompt or a value that cannot be.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    longest = max((len(prompt) for prompt in prompts), default=0)
    decoder = Decoder(
        model,
        max(1, min(rows, len(prompts))),
        max_length=longest + max_new_tokens,
        stop_ids=frozenset(stop_ids),
        sliding=sliding,
        use_cache=use_cache,
    )
    sequences = [decoder.sequence(prompt, sampling) for prompt in prompts]
    for _ in decoder.run(sequences):
        pass
    return [sequence.new_tokens for sequence in sequences]
