"""The OpenAI completions protocol: what a request may say, and the shape of every reply."""

import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from aquila.config.strict import nearest
from aquila.core.errors import UserError
from aquila.generation.answers import Answer
from aquila.generation.sampling import Sampling

MAX_STOPS = 16
_NOT_HERE = ("suffix", "logprobs", "logit_bias", "presence_penalty", "frequency_penalty")


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


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions. Sampling values that are absent are those of the command line."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: str | list[str] | list[int] | list[list[int]] = Field(union_mode="left_to_right")
    max_tokens: int | None = Field(16, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=128)
    best_of: int | None = None
    echo: bool | None = False
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    user: str | None = None
    top_k: int | None = Field(None, ge=0)
    """Ours: as on the command line."""
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e9)
    """Ours: as on the command line."""
    suffix: str | None = None
    logprobs: int | None = None
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

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def sampling(self, default: Sampling, choice: int) -> Sampling:
        """What choice number `choice` of a prompt samples with. Raises `RequestError`."""
        values = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
            if (value := getattr(self, name)) is not None
        }
        if self.stop is not None:
            values["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        values["max_new_tokens"] = 16 if self.max_tokens is None else self.max_tokens
        if self.seed is not None:
            values["seed"] = (self.seed + choice) % 2**63
        try:
            return Sampling(**{**default.__dict__, **values})
        except UserError as error:
            raise RequestError(str(error)) from None


def parse(body: bytes) -> CompletionRequest:
    """The request in a JSON body. Raises `RequestError` that names the field and says what it must be."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error.errors()[0]) from None
    for name in _NOT_HERE:
        value = getattr(request, name)
        if value or (name == "logprobs" and value is not None):  # 0 asks for the tokens' own
            raise RequestError(f"{name} is not offered here; leave it out", name)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError("best_of other than n is not offered here; leave it out", "best_of")
    if not request.prompts():
        raise RequestError("prompt is an empty list; give at least one prompt", "prompt")
    return request


def _explained(item: dict[str, Any]) -> RequestError:
    name = str(item["loc"][0]) if item["loc"] else None
    if item["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {item['ctx']['error']}")
    if item["type"] == "missing":
        return RequestError(f"{name} is missing; every request must have it", name)
    if item["type"] == "extra_forbidden":
        known = [key for key in CompletionRequest.model_fields if key not in _NOT_HERE]
        return RequestError(f"unknown field '{name}'{nearest(name, known)}", name)
    if name == "prompt":
        return RequestError("prompt must be a text, a list of texts, or a list (of lists) of token ids", name)
    if name is None:
        return RequestError('the body must be a JSON object such as {"model": "...", "prompt": "..."}')
    return RequestError(f"{name}: {item['msg'].removeprefix('Value error, ')}", name)


class Reply:
    """Builds the parts of one completion's reply."""

    def __init__(self, model: str):
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._head, "choices": [choice(index, text, finish_reason)]}

    def usage_chunk(self, answers: list[Answer]) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage(answers)}

    def whole(self, texts: list[str], answers: list[Answer]) -> dict[str, Any]:
        """The reply of a request that does not stream."""
        choices = [
            choice(index, text, answer.finish_reason)
            for index, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": usage(answers)}


def choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    # The protocol knows no "context": the model ran out of room, which is a length.
    reason = "length" if finish_reason == "context" else finish_reason
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def usage(answers: list[Answer]) -> dict[str, int]:
    """Token counts; a prompt that is answered n times counts once."""
    prompts = {answer.prompt_number: answer.prompt_tokens for answer in answers}
    new = sum(answer.new_tokens for answer in answers)
    prompt = sum(prompts.values())
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
