"""How often to take a snapshot: often enough that little is redone, seldom enough that training hardly notices."""

from __future__ import annotations

from math import sqrt

AUTO = -1
"""In place of a number of steps: as often as is cheap."""


def snapshot_interval_s(cost_s: float, failures_per_s: float, *, step_s: float, stall_max: float = 0.01) -> float:
    """The interval with the least expected loss, sqrt(2 cost / failure rate) (Young 1974, Daly 2006), within two bounds.

    Args:
        cost_s: what one snapshot holds training up, in seconds; not what it takes in the background.
        failures_per_s: of the whole job: losses after which a snapshot is restored. More than 0.
        step_s: duration of a step; the interval is never shorter.
        stall_max: the largest part of the time that snapshots may hold training up; the interval is never so short that
            they do more.
    """
    if cost_s < 0 or min(failures_per_s, step_s, stall_max) <= 0:
        raise ValueError(
            f"cost_s={cost_s} must be 0 or more, failures_per_s={failures_per_s}, step_s={step_s} and "
            f"stall_max={stall_max} more than 0"
        )
    return max(sqrt(2 * cost_s / failures_per_s), cost_s / stall_max, step_s)
