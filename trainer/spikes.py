"""Jumps of the training loss, which a run logs."""

import statistics
from collections import deque


class Spikes:
    """Losses that jump: above the median of the last 100 by 10% and by eight times their median distance from it.

    Of a normal distribution that is 5.4 standard deviations. A jump is told once, until the loss has come back.
    """

    FEWEST = 20

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=100)
        self._high = False

    def usual(self, loss: float) -> float | None:
        """The usual loss, if this one begins a spike, else None. Takes it into account."""
        begins, median = False, 0.0
        if len(self._recent) >= self.FEWEST:
            median = statistics.median(self._recent)
            distance = statistics.median(abs(x - median) for x in self._recent)
            high = loss > max(median * 1.1, median + 8 * distance)
            begins, self._high = high and not self._high, high
        self._recent.append(loss)
        return median if begins else None
