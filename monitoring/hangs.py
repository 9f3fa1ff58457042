"""When no progress is a hang, for workers in user code and for a world that waits for itself; and when to look before that."""

from __future__ import annotations

from dataclasses import dataclass

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


def suspicion_s(limit_s: float, *, stopped: bool = False) -> float:
    """Return after how much silence to look at all workers, so that it is done when the silence is believed.

    A process that is stopped seldom goes on; one that makes no progress often does, and is suspected later for that.
    """
    return limit_s - min(EVIDENCE_TIMEOUT_S, limit_s / (2 if stopped else 4))


@dataclass(slots=True)
class Sections:
    """What the sections of one worker have taken so far, from which follows how long each may make no progress.

    A step is one section, the callbacks of on_commit after it (which save, as a rule) are another: how long saving takes says
    nothing of steps, and steps nothing of it.

    Attributes:
        longest_step_s, longest_callback_s: the longest of each; 0 while none was seen whole.
    """

    longest_step_s: float = 0.0
    longest_callback_s: float = 0.0
    _committed_at: float | None = None
    _callback_since: float | None = None
    _in_callbacks_s: float = 0.0  # since the newest commit

    def committed(self, steps: int, now: float) -> None:
        """Note that so many steps were committed since the last time."""
        if self._committed_at is not None:
            took_s = now - self._committed_at - self._in_callbacks_s
            self.longest_step_s = max(self.longest_step_s, took_s / steps)
        self._committed_at, self._in_callbacks_s = now, 0.0

    def seen(self, *, in_callback: bool, now: float) -> None:
        """Note in which section the worker is."""
        if in_callback:
            self._callback_since = now if self._callback_since is None else self._callback_since
        elif self._callback_since is not None:
            took_s = now - self._callback_since
            self.longest_callback_s = max(self.longest_callback_s, took_s)
            self._in_callbacks_s += took_s
            self._callback_since = None

    def patience_s(self, given_s: float, start_timeout_s: float) -> float:
        """Return how long the present section may make no progress.

        `given_s` is what a person asked for, for all sections, or 0; `start_timeout_s` holds for what was never seen before.
        """
        if self._callback_since is None:
            return hang_timeout_s(given_s, self.longest_step_s)
        if not self.longest_callback_s:
            return given_s or start_timeout_s
        return hang_timeout_s(given_s, max(self.longest_step_s, self.longest_callback_s))
