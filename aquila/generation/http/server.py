"""An endpoint that speaks the OpenAI protocol (completions and chat), on FastAPI and uvicorn."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

from aquila.core.errors import UserError
from aquila.generation.answers import Answer, Writer, encode_prompt, stop_ids
from aquila.generation.chat import Session
from aquila.generation.decode import Decoder
from aquila.generation.http.protocol import (
    ChatReply,
    ChatRequest,
    CompletionRequest,
    Reply,
    RequestError,
    error_content,
    parse,
)
from aquila.generation.http.scheduler import BusyError, Job, Scheduler
from aquila.generation.logprobs import completion_logprobs

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.requests import ClientDisconnect

    from aquila.generation.http.slow_headers import TimedH11Protocol
except ImportError as error:
    raise UserError(
        f"--serve needs FastAPI and uvicorn ({error.name} is missing): run `pip install fastapi uvicorn`"
    ) from None


Asked = CompletionRequest | ChatRequest
_SCORING = asyncio.Lock()
_DRAINED = 16
"""Times the limit that is read of a request that is too large."""
GRACE_SECONDS = 5
"""How long answers that are open at the end may take."""


@dataclass(frozen=True)
class Limits:
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    rows: int = 8
    """Answers computed at once."""
    waiting: int = 64
    """Answers that may wait; beyond them a request gets 429."""
    body_bytes: int = 4 << 20
    """Larger requests get 413; what they send beyond is read for a while, so that they hear it."""
    body_seconds: float = 60
    """A request whose body takes longer gets 408."""


def serve(session: Session, limits: Limits, listener: socket.socket) -> int:
    """Answers requests that come to `listener` until Ctrl-C or SIGTERM."""
    host, port = listener.getsockname()[:2]
    name = session.loaded.model_dir.name
    address = f"[{host}]" if ":" in host else host
    print(f"model '{name}' at http://{address}:{port}/v1 (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if not host.startswith("127.") and host != "::1":
        print("warning: whoever reaches this address may use the model; there are no keys", file=sys.stderr)
    app = make_app(session, limits)
    settings = uvicorn.Config(
        app,
        http=TimedH11Protocol,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=2 * GRACE_SECONDS,
    )
    # uvicorn ends in good order, then raises the signal again: that, too, is an end as asked for.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        _Server(settings).run(sockets=[listener])
    return 0


class _Server(uvicorn.Server):
    """Told to end, it lets open answers run on for a while, then ends them with a message."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(GRACE_SECONDS)
        await asyncio.to_thread(self.config.app.state.scheduler.close)


def listen(limits: Limits) -> socket.socket:
    """Takes the address. Raises `UserError` when that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            limits.host, limits.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {limits.host} port {limits.port}: {error}; choose another --host or --port"
        ) from None
    return listener


def make_app(session: Session, limits: Limits) -> FastAPI:
    """The application; its scheduler's thread lives as long as the application runs."""
    loaded = session.loaded
    name = loaded.model_dir.name

    def make_decoder() -> Decoder:
        stops = stop_ids(loaded.tokenizer)
        return Decoder(loaded.model, limits.rows, stop_ids=stops, sliding=session.sliding)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.scheduler = Scheduler(make_decoder, limits.waiting)
        yield
        await asyncio.to_thread(app.state.scheduler.close)

    async def check_host(request: Request) -> None:
        _check_host(request, limits.host)

    app = FastAPI(
        title="Aquila", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        dependencies=[Depends(check_host)],
    )  # fmt: skip

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.content, status_code=error.status)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # gone before its request was whole: nobody reads this

    @app.exception_handler(404)
    async def unknown_path(request: Request, error: Exception) -> JSONResponse:
        message = (
            f"no such path {request.url.path}: POST /v1/completions goes on with a text, "
            "POST /v1/chat/completions answers in a conversation; "
            "GET /v1/models and GET /health tell the rest"
        )
        return JSONResponse(error_content(message, None, "invalid_request_error", "not_found"), 404)

    @app.exception_handler(405)
    async def wrong_method(request: Request, error: Exception) -> JSONResponse:
        message = f"{request.method} is not offered for {request.url.path}"
        return JSONResponse(error_content(message, None, "invalid_request_error"), 405)

    @app.get("/health")
    async def health() -> dict:
        running, waiting = app.state.scheduler.load()
        return {"status": "ok", "running": running, "waiting": waiting}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model_entry(name)]}

    @app.get("/v1/models/{asked}")
    async def model(asked: str) -> dict:
        _check_model(asked, name)
        return _model_entry(name)

    async def answer(
        request: Request, kind: type[CompletionRequest] | type[ChatRequest], reply: Reply
    ) -> Response:
        try:
            body = await asyncio.wait_for(_body(request, limits.body_bytes), limits.body_seconds)
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {limits.body_seconds:g} s"
            raise RequestError(message, None, 408) from None
        asked = parse(body, kind)
        _check_model(asked.model, name)
        scheduler: Scheduler = app.state.scheduler
        # Tokenizing a huge text takes a while, during which others shall be answered.
        answers = await asyncio.to_thread(_answers, asked, session, scheduler)
        return await _respond(request, asked, answers, session, scheduler, reply)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionRequest, Reply(name))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatRequest, ChatReply(name))

    return app


def _model_entry(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": "aquila"}


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        raise RequestError(f"no model '{asked}' here; it is '{name}'", "model", 404, "model_not_found")


async def _body(request: Request, limit: int) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"send the request as application/json (this is '{kind}')", None, 415)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > _DRAINED * limit:
            break
    if size > limit:
        raise RequestError(f"the request exceeds {limit} bytes", None, 413)
    return b"".join(parts)


def _check_host(request: Request, host: str) -> None:
    """On a loopback address only its own names: a web page elsewhere may let its name point here."""
    asked = request.url.hostname or ""
    own = {"localhost", "::1", "0.0.0.0", host.lower()}
    if _is_loopback(host) and not (asked in own or asked.startswith("127.")):
        raise RequestError(f"this endpoint answers to localhost alone, not to '{asked[:100]}'", None, 421)


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "localhost")


def _answers(asked: Asked, session: Session, scheduler: Scheduler) -> list[Answer]:
    """One answer for each prompt and choice. Raises `RequestError` for what the model cannot take."""
    tokenizer, context = session.loaded.tokenizer, scheduler.decoder.context
    prompts, choices = asked.prompts(), asked.n or 1
    field = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if len(prompts) * choices > scheduler.capacity:
        raise RequestError(
            f"{len(prompts)} prompts with n={choices} are more than the {scheduler.capacity} answers that "
            "this endpoint takes at once; send fewer",
            field,
        )
    answers = []
    for place, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else None
        try:
            ids = encode_prompt(tokenizer, prompt) if text is not None else prompt
            room = context - len(ids)
            for number in range(choices):
                sampling = asked.sampling(session.sampling, number, max(room, 0))
                sequence = scheduler.decoder.sequence(ids, sampling)
                shown = text if text is not None else tokenizer.decode(ids)
                answers.append(Answer(shown, sequence, prompt_number=place))
        except UserError as error:
            code = "context_length_exceeded" if len(ids) >= context else None
            raise RequestError(str(error), field, code=code) from None
        if asked.logprobs is not None and len(ids) + sampling.max_new_tokens > context:
            message = f"logprobs need prompt and answer within the model's context of {context} tokens"
            raise RequestError(message, "logprobs", code="context_length_exceeded")
        new = asked.asked_tokens() or 0
        if new > room and not session.sliding:
            raise RequestError(
                f"the model's context holds {context} tokens; the prompt has {len(ids)}, so that max_tokens "
                f"can be at most {room} (got {new})",
                "max_tokens",
                code="context_length_exceeded",
            )
    return answers


async def _respond(
    request: Request,
    asked: Asked,
    answers: list[Answer],
    session: Session,
    scheduler: Scheduler,
    reply: Reply,
) -> Response:
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[int, str, str | None]] = asyncio.Queue()

    def emit(index: int, text: str, reason: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(pieces.put_nowait, (index, text, reason))

    job = Job([Writer(session.loaded.tokenizer, answer) for answer in answers], emit)
    try:
        scheduler.submit(job)
    except BusyError:
        message = "too many answers are waiting; try again in a moment"
        content = error_content(message, None, "rate_limit_error", "busy")
        return JSONResponse(content, 429, headers={"Retry-After": "1"})
    if asked.stream:
        events = _events(asked, answers, pieces, scheduler, job, reply)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    return await _whole(request, asked, answers, pieces, scheduler, job, reply, session)


async def _events(asked, answers, pieces, scheduler, job, reply) -> AsyncIterator[str]:
    """Server-sent events; when the client leaves, the answers end."""
    try:
        for index, answer in enumerate(answers):
            for part in reply.opening(index, answer.prompt, bool(asked.echo)):
                yield _event(part)
        open_answers = len(answers)
        while open_answers:
            index, text, reason = await pieces.get()
            if reason == "error":
                yield _event(error_content(text, None, "server_error"))
                return
            open_answers -= reason is not None
            if text or reason:
                yield _event(reply.chunk(index, text, reason))
        if asked.stream_options and asked.stream_options.include_usage:
            yield _event(reply.usage_chunk(answers))
        yield "data: [DONE]\n\n"
    finally:
        scheduler.cancel(job)


def _logprobs(asked: CompletionRequest, answers: list[Answer], session: Session) -> list[dict]:
    """Of each answer, by one pass over prompt and answer; of a text, the token before it is not shown."""
    loaded, given = session.loaded, asked.prompts()
    found = []
    for answer in answers:
        sequence = answer.sequence
        tokens = sequence.tokens + ([sequence.end_token] if sequence.end_token is not None else [])
        first = int(isinstance(given[answer.prompt_number], str)) if asked.echo else sequence.prompt_length
        found.append(completion_logprobs(loaded.model, loaded.tokenizer, tokens, first, asked.logprobs or 0))
    return found


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _whole(request, asked, answers, pieces, scheduler, job, reply, session) -> Response:
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        open_answers = len(answers)
        while open_answers:
            piece = asyncio.ensure_future(pieces.get())
            await asyncio.wait((piece, gone), return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                piece.cancel()
                return Response(status_code=499)  # nobody reads it
            _, text, reason = piece.result()
            if reason == "error":
                return JSONResponse(error_content(text, None, "server_error"), 500)
            open_answers -= reason is not None
        texts = [(answer.prompt if asked.echo else "") + answer.text for answer in answers]
        logprobs = None
        if asked.logprobs is not None and not isinstance(asked, ChatRequest):
            async with _SCORING:  # beside the answers of others, but one after the other
                logprobs = await asyncio.to_thread(_logprobs, asked, answers, session)
        return JSONResponse(reply.whole(texts, answers, logprobs))
    finally:
        gone.cancel()
        scheduler.cancel(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
