"""What a login shell prints before the agent's lines is no event, and ends nothing."""

import io
import queue
import time
from collections import deque

import pytest

from aquila.launch.channel import Channel


@pytest.mark.parametrize("greeting", [b"Welcome\n", b"5\n", b"[1, 2]\n", b"null\n", b'{"motd": "hello"}\n',
                                      b"[" * 100_000 + b"\n", b"\xff\xfe\n"])  # fmt: skip
def test_a_greeting_is_kept_for_the_error_alone(greeting: bytes) -> None:
    line = Channel.__new__(Channel)
    line.index, line.events, line.errors, line.last_heard = (
        3,
        queue.Queue(),
        deque(maxlen=20),
        time.monotonic(),
    )
    line._stdout = io.BytesIO(greeting + b'{"event": "hello"}\n')
    line._read()
    told = [line.events.get_nowait() for _ in range(2)]
    assert [(index, event["event"]) for index, event in told] == [(3, "hello"), (3, "closed")]
    assert list(line.errors) == [greeting.decode("utf-8", errors="replace")]
