"""Detection of jumps of the training loss, which a run logs."""

import statistics
from collections import deque


class Spikes:
    """Detects a loss above the median of the last 100 by more than 10% and by more than 8 median absolute deviations.

    8 median absolute deviations of a normal distribution are 5.4 standard deviations. A spike is reported once, until a
    loss is below these bounds again.
    """

    WINDOW_LOSSES = 100
    MIN_LOSSES = 20  # the median of fewer losses says too little

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW_LOSSES)
        self._in_spike = False

    def median_if_spike(self, loss: float) -> float | None:
        """The median of the recent losses if a spike begins with this loss, else None. Records the loss."""
        median = None
        if len(self._recent) >= self.MIN_LOSSES:
            median = statistics.median(self._recent)
            deviation = statistics.median(abs(other - median) for other in self._recent)
            was_in_spike = self._in_spike
            self._in_spike = loss > max(median * 1.1, median + 8 * deviation)
            if was_in_spike or not self._in_spike:
                median = None
        self._recent.append(loss)
        return median
