"""The OpenAI protocol, completions and chat: what a request may say, and the shape of every reply."""

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from aquila.config.strict import nearest
from aquila.core.errors import UserError
from aquila.data.prepare.answers import conversation
from aquila.generation.answers import Answer
from aquila.generation.sampling import Sampling

MAX_STOPS = 16
TURN = "###"
"""What stands before each turn of AquilaChat's conversations, and so ends an answer."""


class RequestError(Exception):
    """A request that cannot be answered, with the HTTP status and the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.content = error_content(message, param, "invalid_request_error", code)


def error_content(message: str, param: str | None, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Request(BaseModel, ABC):
    """What both kinds of request may say. Values that are absent are those of the command line."""

    model_config = ConfigDict(extra="forbid", strict=True)
    not_here: ClassVar[tuple[str, ...]] = ("logit_bias", "presence_penalty", "frequency_penalty")
    """Fields that are known and not offered; they may be absent, null, 0, false or empty."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    user: str | None = None
    top_k: int | None = Field(None, ge=0)
    """Ours: as on the command line."""
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e9)
    """Ours: as on the command line."""
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @field_validator("temperature", "top_p", "repetition_penalty", mode="before")
    @classmethod
    def _whole_numbers_too(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"must be at most {MAX_STOPS} strings, none of them empty")
        return value

    @abstractmethod
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, as text or as token ids."""

    def asked_tokens(self) -> int | None:
        """The longest answer that the client wants, in tokens, where it says so."""
        return self.max_tokens

    @abstractmethod
    def usual_tokens(self, room: int) -> int:
        """The same where it does not, in a context with `room` tokens left."""

    def stops(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """Texts that end an answer; `default` are the command line's."""
        if self.stop is None:
            return default
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def refuse(self) -> None:
        """Raises `RequestError` for what is not offered."""
        for name in self.not_here:
            value = getattr(self, name)
            if value:
                raise RequestError(f"{name} is not offered here; leave it out", name)

    def sampling(self, default: Sampling, choice: int, room: int) -> Sampling:
        """What choice number `choice` of a prompt samples with. Raises `RequestError`."""
        values = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
            if (value := getattr(self, name)) is not None
        }
        values["stop"] = self.stops(default.stop)
        tokens = self.asked_tokens()
        values["max_new_tokens"] = self.usual_tokens(room) if tokens is None else tokens
        if self.seed is not None:
            values["seed"] = (self.seed + choice) % 2**63
        try:
            return Sampling(**{**default.__dict__, **values})
        except UserError as error:
            raise RequestError(str(error)) from None


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    not_here = (*_Request.not_here, "suffix")

    prompt: str | list[str] | list[int] | list[list[int]] = Field(union_mode="left_to_right")
    best_of: int | None = None
    echo: bool | None = False
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    """So many of the likeliest tokens at each place, and each token's own; with `echo` of the prompt, too."""

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def usual_tokens(self, room: int) -> int:
        return 16

    def refuse(self) -> None:
        super().refuse()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of other than n is not offered here; leave it out", "best_of")
        if self.logprobs is not None and self.stream:
            raise RequestError("logprobs come with a whole reply; leave out stream", "logprobs")
        if not self.prompts():
            raise RequestError("prompt is an empty list; give at least one prompt", "prompt")


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Other fields of a turn, such as `name`, have no place in the conversation's text."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def turn(self) -> dict[str, str]:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"from": "system" if self.role == "developer" else self.role, "value": text}


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions: a conversation, in the text form of AquilaChat."""

    not_here = (
        *_Request.not_here,
        *("logprobs", "top_logprobs", "tools", "functions", "audio", "prediction", "web_search_options"),
    )

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    response_format: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    echo: ClassVar[bool] = False

    def prompts(self) -> list[str | list[int]]:
        turns = [message.turn() for message in self.messages]
        return [conversation(turns, "aquila") + f"{TURN}Assistant:"]

    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def usual_tokens(self, room: int) -> int:
        return room

    def stops(self, default: tuple[str, ...]) -> tuple[str, ...]:
        return (TURN, *super().stops(default))

    def refuse(self) -> None:
        super().refuse()
        if self.response_format not in (None, {"type": "text"}):
            raise RequestError("response_format other than text is not offered here", "response_format")
        if self.messages[-1].role != "user":
            raise RequestError("the last of the messages must be the user's", "messages")


Kind = TypeVar("Kind", CompletionRequest, ChatRequest)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """The request in a JSON body. Raises `RequestError` that names the field and says what it must be."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error.errors()[0], kind) from None
    request.refuse()
    return request


def _explained(item: dict[str, Any], kind: type[_Request]) -> RequestError:
    name = str(item["loc"][0]) if item["loc"] else None
    if item["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {item['ctx']['error']}")
    if name is None:
        example = "prompt" if kind is CompletionRequest else "messages"
        return RequestError(f'the body must be a JSON object such as {{"model": "...", "{example}": ...}}')
    if name == "messages" and len(item["loc"]) > 1:
        place, *rest = item["loc"][1:]
        where = ".".join(str(part) for part in rest if part not in ("str", "list[TextPart]"))
        if "content" in rest:
            return RequestError(f"message {place}: {where} must be a text, or a list of text parts", name)
        return RequestError(f"message {place}: {where or 'it'}: {item['msg']}", name)
    if item["type"] == "missing":
        return RequestError(f"{name} is missing; every request must have it", name)
    if item["type"] == "extra_forbidden":
        known = [key for key in kind.model_fields if key not in kind.not_here]
        return RequestError(f"unknown field '{name}'{nearest(name, known)}", name)
    if name == "prompt":
        return RequestError("prompt must be a text, a list of texts, or a list (of lists) of token ids", name)
    return RequestError(f"{name}: {item['msg'].removeprefix('Value error, ')}", name)


class Reply:
    """Builds the parts of one completion's reply."""

    prefix, whole_kind, part_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str):
        self._head = {"id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def opening(self, index: int, prompt: str, echo: bool) -> list[dict[str, Any]]:
        """What comes before an answer's own text in a stream."""
        return [self.chunk(index, prompt, None)] if echo else []

    def chunk(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """One event of a stream."""
        return self._part([self._choice(index, {"text": text}, finish_reason)])

    def usage_chunk(self, answers: list[Answer]) -> dict[str, Any]:
        return {**self._part([]), "usage": usage(answers)}

    def whole(
        self, texts: list[str], answers: list[Answer], logprobs: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The reply of a request that does not stream."""
        told = logprobs or [None] * len(answers)
        choices = [
            {**self._choice(index, self._body(text), answer.finish_reason), "logprobs": logs}
            for index, (text, answer, logs) in enumerate(zip(texts, answers, told, strict=True))
        ]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": usage(answers)}

    def _body(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.part_kind, "choices": choices}

    def _choice(self, index: int, body: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        # The protocol knows no "context": the model ran out of room, which is a length.
        reason = "length" if finish_reason == "context" else finish_reason
        return {"index": index, **body, "logprobs": None, "finish_reason": reason}


class ChatReply(Reply):
    """The same of one turn of a conversation, without the blank that stands before it in the text."""

    prefix, whole_kind, part_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str):
        super().__init__(model)
        self._begun: set[int] = set()

    def opening(self, index: int, prompt: str, echo: bool) -> list[dict[str, Any]]:
        return [self._part([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])]

    def chunk(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        if text and index not in self._begun:
            self._begun.add(index)
            text = text.removeprefix(" ")
        return self._part([self._choice(index, {"delta": {"content": text} if text else {}}, finish_reason)])

    def _body(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text.removeprefix(" ")}}


def usage(answers: list[Answer]) -> dict[str, int]:
    """Token counts; a prompt that is answered n times counts once."""
    prompts = {answer.prompt_number: answer.prompt_tokens for answer in answers}
    new = sum(answer.new_tokens for answer in answers)
    prompt = sum(prompts.values())
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
