"""A conversation's state: the loaded model, the sampling that is set, and the last answer."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from aquila.generation.answers import Answer, stop_ids, stream_answers
from aquila.generation.decode import Decoder
from aquila.generation.load import LoadedModel
from aquila.generation.sampling import Sampling


@dataclass
class Session:
    loaded: LoadedModel
    sampling: Sampling
    sliding: bool = False
    rows: int = 8
    """Prompts answered at once, when several are given."""
    last: Answer | None = None
    _decoder: Decoder | None = field(default=None, repr=False)

    def set(self, name: str, value: object) -> None:
        """Changes one sampling value. Raises `UserError` when it is out of range."""
        self.sampling = dataclasses.replace(self.sampling, **{name: value})

    def answer(self, prompt: str) -> Iterator[tuple[str, Answer]]:
        """Streams one answer: (new text, answer so far). Closing the iterator stops it."""
        decoder, self._decoder = self._decoder or self._new_decoder(1), None
        for _, piece, answer in stream_answers(decoder, self.loaded.tokenizer, [prompt], [self.sampling]):
            self.last = answer
            yield piece, answer
        # Kept only after an answer that ended by itself: an interrupted step leaves it in no known state.
        self._decoder = decoder

    def answers(self, prompts: list[str], samples: int = 1) -> Iterator[Answer]:
        """Whole answers in the order of `prompts`, `samples` of each; sample i is seeded with seed + i."""
        requests = [(prompt, self._numbered(i)) for prompt in prompts for i in range(samples)]
        decoder = self._new_decoder(min(self.rows, max(len(requests), 1)))
        done: dict[int, Answer] = {}
        due = 0
        texts, samplings = [text for text, _ in requests], [sampling for _, sampling in requests]
        for index, _, answer in stream_answers(decoder, self.loaded.tokenizer, texts, samplings):
            if answer.finish_reason is not None:
                done[index] = answer
            while due in done:
                yield done.pop(due)
                due += 1

    def _numbered(self, sample: int) -> Sampling:
        if self.sampling.seed is None or sample == 0:
            return self.sampling
        return dataclasses.replace(self.sampling, seed=self.sampling.seed + sample)

    def _new_decoder(self, rows: int) -> Decoder:
        stops = stop_ids(self.loaded.tokenizer)
        return Decoder(self.loaded.model, rows, stop_ids=stops, sliding=self.sliding)
