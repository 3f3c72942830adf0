"""What may go wrong while running: signals that ask for an end."""

import os
import signal
from types import FrameType


class StopFlag:
    """Set by the first SIGINT, SIGTERM, SIGHUP or SIGUSR1; the ranks agree on it at the end of a step. A second ends.

    A context: the handlers of before come back when it is left.
    """

    asked = False

    def __enter__(self) -> "StopFlag":
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
