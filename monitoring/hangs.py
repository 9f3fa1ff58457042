"""When no progress is a hang, for workers in user code and for a world that waits for itself; and when to look before that."""

from __future__ import annotations

STEPS_OF_SILENCE = 5
TIMEOUT_S_MIN = 10.0
EVIDENCE_TIMEOUT_S = 1.0
"""How long it may take to look at all workers, before one of them is taken for lost."""


def hang_timeout_s(given_s: float, step_s: float) -> float:
    """Return for how long no progress is believed.

    Args:
        given_s: What a person asked for; 0 for a number derived from the steps.
        step_s: The longest step seen, or 0 while none was.
    """
    return given_s or max(TIMEOUT_S_MIN, STEPS_OF_SILENCE * step_s)


def suspicion_s(limit_s: float) -> float:
    """Return after how much silence to look at all workers, so that it is done when the silence is believed."""
    return limit_s - min(EVIDENCE_TIMEOUT_S, limit_s / 2)
