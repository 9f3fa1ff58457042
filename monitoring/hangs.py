"""When no progress is a hang: a rule for workers in user code, and for a world that waits for itself."""

from __future__ import annotations

STEPS_OF_SILENCE = 5
TIMEOUT_S_MIN = 10.0


def hang_timeout_s(given_s: float, step_s: float) -> float:
    """Return for how long no progress is believed.

    Args:
        given_s: What a person asked for; 0 for a number derived from the steps.
        step_s: The longest step seen, or 0 while none was.
    """
    return given_s or max(TIMEOUT_S_MIN, STEPS_OF_SILENCE * step_s)
