"""Many requests, one model: a thread that steps all answers together and lets new ones in at any step."""

import threading
from collections import deque
from collections.abc import Callable

from aquila.generation.answers import Writer
from aquila.generation.decode import Decoder, Sequence


class BusyError(Exception):
    """No more can wait; the client should come back later."""


class Job:
    """The answers of one request. `emit(index, text, finish_reason)` is called from the scheduler's thread
    for every new piece; the reason is set with an answer's last piece, "error" when computing failed."""

    def __init__(self, writers: list[Writer], emit: Callable[[int, str, str | None], None]):
        self.writers = writers
        self.emit = emit


class Scheduler:
    """Runs jobs on `decoder`, whose rows are the limit of answers at once; `max_waiting` more may queue."""

    def __init__(self, make_decoder: Callable[[], Decoder], max_waiting: int):
        self._make_decoder = make_decoder
        self.decoder = make_decoder()
        self.capacity = max_waiting + self.decoder.rows
        self._waiting: deque[tuple[Job, int]] = deque()
        self._running: dict[Sequence, tuple[Job, int]] = {}
        self._cancelled: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job. Raises `BusyError` when more would wait than may."""
        with self._changed:
            asked = len(self._running) + len(self._waiting) + len(job.writers)
            if self._closing or asked > self.capacity:
                raise BusyError
            self._waiting.extend((job, index) for index in range(len(job.writers)))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job whose client has left; one that is done is left as it is."""
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the step in hand, and every open answer with an error that says so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def load(self) -> tuple[int, int]:
        """(answers being computed, answers waiting)."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._running or self._cancelled):
                    self._changed.wait()
                if self._closing:
                    break
                self._drop_cancelled()
                entering = self._enter()
            try:
                events = self.decoder.admit(entering) if entering else []
                events += self.decoder.step()
            except Exception as error:  # one bad step must not end the endpoint
                self._fail(error)
                continue
            for sequence, token in events:
                self._pass_on(sequence, token)
        self._end_all([*self._running.values(), *self._waiting], "the endpoint is shutting down")

    def _enter(self) -> list[Sequence]:
        entering = []
        while self._waiting and len(self._running) < self.decoder.rows:
            job, index = self._waiting.popleft()
            sequence = job.writers[index].answer.sequence
            self._running[sequence] = (job, index)
            entering.append(sequence)
        return entering

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        gone = set(map(id, self._cancelled))
        self._cancelled.clear()
        self._waiting = deque(item for item in self._waiting if id(item[0]) not in gone)
        for sequence in [key for key, (job, _) in self._running.items() if id(job) in gone]:
            self._running.pop(sequence)
            self.decoder.drop(sequence)

    def _pass_on(self, sequence: Sequence, token: int | None) -> None:
        if sequence not in self._running:  # ended by a stop string in the same round
            return
        job, index = self._running[sequence]
        writer = job.writers[index]
        piece = writer.take(token)
        reason = writer.answer.finish_reason
        if reason is not None:
            with self._changed:
                self._running.pop(sequence)
            self.decoder.drop(sequence)
        job.emit(index, "no token could be drawn with these values" if reason == "error" else piece, reason)

    def _fail(self, error: Exception) -> None:
        """Ends all running answers with an error, and starts anew with an empty cache."""
        with self._changed:
            failed, self._running = list(self._running.values()), {}
        self._end_all(failed, f"{type(error).__name__}: {error}")
        self.decoder = self._make_decoder()

    def _end_all(self, answers: list[tuple[Job, int]], message: str) -> None:
        for job, index in answers:
            job.emit(index, message, "error")
