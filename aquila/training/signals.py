"""What a signal asks of a run: SIGTERM and SIGINT to save and stop, SIGUSR1 to save and go on."""

import signal
from typing import Any


class Requests:
    """Set by signals, read at step boundaries. A second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        self.stop = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
