"""A histogram that can be added up, shown and read by Prometheus: counts by upper bound, and the sum. Pure."""

from __future__ import annotations

import bisect
import itertools
import math


class Histogram:
    """Observations, counted by the smallest of `bounds` that they do not exceed.

    Args:
        bounds: Upper bounds, ascending; what exceeds them all is counted, too.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = (*bounds, math.inf)
        self.counts = [0] * len(self.bounds)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, observations up to it) as Prometheus writes them."""
        names = ["+Inf" if bound == math.inf else f"{bound:g}" for bound in self.bounds]
        return [(name, float(total)) for name, total in zip(names, itertools.accumulate(self.counts), strict=True)]
