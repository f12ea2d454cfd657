"""HTTP/1.1 as uvicorn speaks it, with a limit on the time in which a request's head arrives.

uvicorn closes connections that are idle between requests, but waits for ever for the rest of a head; a few
hundred such connections use up what a process may open.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_ANSWER = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class TimedH11Protocol(H11Protocol):
    """Closes a connection on which no whole head has come for `header_seconds`."""

    header_seconds = 20.0
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait for the first head."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Waits on, or for the head no longer."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.conn.their_state is not h11.IDLE or answering:
            self._forget()
        elif self._due is None:
            self._due = self.loop.call_later(self.header_seconds, self._close)

    def _forget(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _close(self) -> None:
        self._due = None
        if not self.transport.is_closing():
            self.transport.write(_ANSWER)
            self.transport.close()
