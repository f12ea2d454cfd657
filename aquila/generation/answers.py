"""From a prompt's text to an answer's text: encoding, streaming, stop strings, figures."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from aquila.core.errors import UserError
from aquila.generation.decode import Decoder, Sequence
from aquila.generation.sampling import Sampling
from aquila.generation.stopping import StopFilter
from aquila.tokenizer import Tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt as the beginning of a document: [CLS] in front, no end token; specials are not parsed."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer, as in the original: `</s>` and `<|endoftext|>`."""
    return frozenset((tokenizer.eos_id, tokenizer.pad_id))


@dataclass
class Answer:
    """One answer as it grows; the figures are final once `finish_reason` is set."""

    prompt: str
    sequence: Sequence
    prompt_number: int = 0
    """Which prompt of its request this answers."""
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    """stop (end token or stop string), length (max_new_tokens), context (the window is full), or
    interrupted."""
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    ended: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def prompt_tokens(self) -> int:
        return self.sequence.prompt_length

    @property
    def new_tokens(self) -> int:
        return len(self.sequence.new_tokens)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the request to the first token: the prompt's prefill."""
        return None if self.first_token is None else self.first_token - self.started

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first over the seconds after the first; None for fewer than two tokens."""
        if self.first_token is None or self.new_tokens < 2 or self.seconds == 0:
            return None
        return (self.new_tokens - 1) / max((self.ended or time.perf_counter()) - self.first_token, 1e-9)

    def as_dict(self) -> dict:
        """The answer as a JSON object."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "token_ids": list(self.sequence.new_tokens),
            "seed": self.sequence.seed,
            "seconds": round(self.seconds, 4),
            "time_to_first_token": None if self.first_token is None else round(self.time_to_first_token, 4),
            "tokens_per_second": None if self.tokens_per_second is None else round(self.tokens_per_second, 2),
        }


class Writer:
    """Turns one sequence's tokens into its answer's text pieces."""

    def __init__(self, tokenizer: Tokenizer, answer: Answer):
        self.answer = answer
        self._decode = tokenizer.decode_stream()
        self._filter = StopFilter(answer.sequence.sampling.stop)

    def take(self, token: int | None) -> str:
        """The new text after one token (None: the sequence ended without one)."""
        answer = self.answer
        if answer.first_token is None:
            answer.first_token = time.perf_counter()
        piece = "" if token is None else self._filter.push(self._decode.push(token))
        if self._filter.stopped:
            self.end("stop")
        elif answer.sequence.finish_reason is not None:
            piece += self._filter.push(self._decode.flush())
            if self._filter.stopped:
                self.end("stop")
            else:
                piece += self._filter.flush()
                self.end(answer.sequence.finish_reason)
        if piece:
            answer.pieces.append(piece)
        return piece

    def end(self, reason: str) -> None:
        self.answer.finish_reason, self.answer.ended = reason, time.perf_counter()


def stream_answers(
    decoder: Decoder, tokenizer: Tokenizer, prompts: list[str], samplings: list[Sampling]
) -> Iterator[tuple[int, str, Answer]]:
    """Answers all `prompts` at once; yields (index, new text, answer) as tokens come.

    The last item of an answer has its `finish_reason` set. Raises `UserError` for a prompt that leaves
    no room for an answer. Closing the iterator ends the answers.
    """
    writers: dict[Sequence, tuple[int, Writer]] = {}
    for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        try:
            sequence = decoder.sequence(encode_prompt(tokenizer, prompt), sampling)
        except UserError as error:
            where = f"prompt {index + 1}: " if len(prompts) > 1 else ""
            raise UserError(f"{where}{error}") from None
        writers[sequence] = (index, Writer(tokenizer, Answer(prompt, sequence)))
    try:
        for sequence, token in decoder.run(list(writers)):
            index, writer = writers[sequence]
            piece = writer.take(token)
            if writer.answer.finish_reason is not None:
                decoder.drop(sequence)
            yield index, piece, writer.answer
    finally:
        for sequence, (_, writer) in writers.items():
            decoder.drop(sequence)
            if writer.answer.finish_reason is None:
                writer.end("interrupted")
