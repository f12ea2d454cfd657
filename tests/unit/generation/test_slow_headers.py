"""Connections whose request never becomes whole are closed; others are not touched."""

import socket
import threading
import time

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the serve extra is not installed")


@pytest.fixture
def address():
    from aquila.generation.http.slow_headers import TimedH11Protocol

    class Impatient(TimedH11Protocol):
        header_seconds = 0.4

    async def app(scope, receive, send):
        body = (await receive())["body"]
        if scope["path"] == "/slow":  # an answer may take longer than a head
            import asyncio

            await asyncio.sleep(1.0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok" if body is not None else b"no"})

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=Impatient, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()


def answer(connection):
    """All that comes until the other side closes."""
    connection.settimeout(20)
    parts = []
    while part := connection.recv(4096):
        parts.append(part)
    return b"".join(parts)


def first_answer(connection):
    """One whole answer of a connection that stays open."""
    connection.settimeout(20)
    got = connection.recv(4096)
    while b"ok" not in got:
        got += connection.recv(4096)
    return got


def test_a_head_that_never_ends_is_answered_with_408_however_slowly_it_grows(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-a: ")
        for _ in range(3):
            time.sleep(0.05)
            connection.sendall(b"a")
        assert answer(connection).startswith(b"HTTP/1.1 408 Request Timeout")
    with socket.create_connection(address) as silent:
        assert answer(silent).startswith(b"HTTP/1.1 408")


def test_a_long_answer_and_a_second_request_are_not_cut(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        assert first_answer(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /again HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 200")


def test_a_second_head_that_never_ends_is_closed_too(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        first_answer(connection)
        connection.sendall(b"GET /x HTTP/1.1\r\nX: ")
        assert answer(connection).startswith(b"HTTP/1.1 408")
