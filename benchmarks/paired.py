"""Two sides measured in turns, so that what the machine does meanwhile cancels: times, ratios, intervals."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from torch import Tensor

CONFIDENCE = 0.95


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the order-statistic interval of the median: the narrowest symmetric one that covers 95 %.

    The number of values below the median is binomial(n, 1/2), so that [x_(k), x_(n+1-k)] covers it with
    probability 1 - 2 P(X < k) (David and Nagaraja, "Order Statistics", section 7.1). With fewer than six
    values it is all of them.
    """
    ordered = sorted(values)
    n = len(ordered)
    tail, below = 0.0, 0
    while below < (n - 1) // 2:
        tail += math.comb(n, below) / 2**n
        if 2 * tail > 1 - CONFIDENCE:
            break
        below += 1
    below = max(below - 1, 0) if n else 0
    return ordered[below], ordered[n - 1 - below]


def ratio(values: Sequence[float], others: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median of the paired ratios of values to others, and its interval."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    low, high = median_interval(ratios)
    return round(statistics.median(ratios), 4), [round(low, 4), round(high, 4)]


def timed_s(deed: Callable[[], object]) -> float:
    """Return how long it takes."""
    began_s = time.perf_counter()
    deed()
    return time.perf_counter() - began_s


def beside_copies(
    deed: Callable[[], float], flat: tuple[Tensor, Tensor], rounds: int
) -> tuple[list[float], list[float]]:
    """Return how long a deed took (what it returns), and the mean time of the flat copies before and after it.

    Args:
        flat: from where to where is copied; warm.
    """
    source, target = flat
    deeds_s, copies_s = [], []
    for _ in range(rounds):
        before_s = timed_s(lambda: target.copy_(source))
        deeds_s.append(deed())
        copies_s.append((before_s + timed_s(lambda: target.copy_(source))) / 2)
    return deeds_s, copies_s
