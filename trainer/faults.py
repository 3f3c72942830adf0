"""What may go wrong while running: signals that ask for an end."""

import os
import signal
from types import FrameType


class StopFlag:
    """Set by the first SIGINT, SIGTERM or SIGUSR1; the ranks agree on it at the end of the step. A second one ends."""

    def __init__(self) -> None:
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
