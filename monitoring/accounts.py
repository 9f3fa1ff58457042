"""Where a job's time goes: every second from its beginning is productive, or is charged to one reason why it was not.

    productive + sum of badput over all reasons + what is not settled yet = elapsed

Time is charged as it passes, to whatever the job was doing. Whether a step is kept is known once it is committed, and what an
incident has cost at its end: then one median step, which would have been needed anyway, is given back. So the badput of
incidents that do not overlap is the sum of the seconds that the ledger says they have lost. Pure: seconds come in as arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

HOUR_S = 3600.0
MARK_EVERY_S = 10.0
"""Between two marks of the sliding hour."""


class Reason(StrEnum):
    """Why a second was not productive. Those of recoveries come in the order in which they happen."""

    DETECT = "detect"  # from the fault until it was found
    FENCE = "fence"  # until a new generation was opened
    REGROUP = "regroup"  # until all had prepared it
    MOVE = "move"  # until all had adopted it, with the state that it needs
    REDO = "redo"  # until a step was committed that never was before
    RESTORE = "restore"  # the state came back from the nodes' memory, or from a checkpoint
    STARTUP = "startup"  # until the first step was committed
    WAITING = "waiting"  # for as many nodes as the job asks for at least
    CONTROLLER_AWAY = "controller_away"  # no controller, and no step that is known from that time
    EVALUATION = "evaluation"  # between two steps, where a prepared model ran forward
    BUSY = "busy"  # between two steps, announced with session.busy() or in a callback of on_commit
    ENDING = "ending"  # after the training loop


RECOVERY = (Reason.DETECT, Reason.FENCE, Reason.REGROUP, Reason.MOVE, Reason.RESTORE, Reason.WAITING, Reason.REDO)
"""Reasons that an incident brings about."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How the accounts stood at one moment, in seconds; `steps` had been committed."""

    elapsed_s: float
    presumed_s: float
    steps: int


@dataclass(slots=True)
class Accounts:
    """The time of one job. What is settled never becomes less, so that it may be shown as counters.

    Attributes:
        productive_s: Seconds in which steps were trained that were kept; settled.
        badput_s: Seconds that were not productive, by reason; settled.
        pending_s: Seconds since the newest step was committed, in which another one was trained as far as is known.
        recovery_s: What the incidents that are open have cost so far, by reason.
        away_s: How long no controller was here, while it is not known yet what was trained meanwhile.
        charged_at: Up to when all is charged; None before the beginning.
        step_then, step_s_then: Step that was committed when the controller before this one last wrote, and what one took.
        marks: How it all stood in the course of the last hour.
    """

    productive_s: float = 0.0
    badput_s: dict[Reason, float] = field(default_factory=dict)
    pending_s: float = 0.0
    recovery_s: dict[Reason, float] = field(default_factory=dict)
    away_s: float = 0.0
    charged_at: float | None = None
    step_then: int = 0
    step_s_then: float = 0.0
    marks: deque[Mark] = field(default_factory=deque)

    @property
    def unsettled_s(self) -> float:
        return self.pending_s + self.away_s + sum(self.recovery_s.values())

    @property
    def elapsed_s(self) -> float:
        return self.productive_s + sum(self.badput_s.values()) + self.unsettled_s

    @property
    def presumed_s(self) -> float:
        """Productive seconds, those included that will be if the step in progress is committed."""
        return self.productive_s + self.pending_s

    @property
    def has_trained(self) -> bool:
        return self.presumed_s > 0

    def charge(self, now: float, reason: Reason | None, *, is_recovery: bool, steps: int) -> None:
        """Charge the time since the last call to a reason; None: a step was trained, as far as is known."""
        if self.charged_at is not None:
            self._add(reason, max(0.0, now - self.charged_at), is_recovery=is_recovery)
        self.charged_at = now
        if not self.marks or self.elapsed_s - self.marks[-1].elapsed_s >= MARK_EVERY_S:
            self.marks.append(Mark(self.elapsed_s, self.presumed_s, steps))
        while len(self.marks) > 1 and self.elapsed_s - self.marks[1].elapsed_s >= HOUR_S:
            self.marks.popleft()

    def _add(self, reason: Reason | None, seconds: float, *, is_recovery: bool) -> None:
        if reason is None:
            self.pending_s += seconds
        elif reason is Reason.CONTROLLER_AWAY:
            self.away_s += seconds
        elif is_recovery and reason in RECOVERY:
            self.recovery_s[reason] = self.recovery_s.get(reason, 0.0) + seconds
        else:
            self._settle(reason, seconds)

    def _settle(self, reason: Reason, seconds: float) -> None:
        self.badput_s[reason] = self.badput_s.get(reason, 0.0) + seconds

    def committed(self) -> None:
        """A step was committed: the time until now was productive."""
        self.productive_s += self.pending_s
        self.pending_s = 0.0

    def went_aside(self, reason: Reason, seconds: float) -> None:
        """Workers have done something else for so long since the newest step."""
        seconds = min(seconds, self.pending_s)
        self.pending_s -= seconds
        self._settle(reason, seconds)

    def found(self, silent_s: float) -> None:
        """A fault was found now, `silent_s` after it happened: since then no step was trained."""
        seconds = min(silent_s, self.pending_s)
        self.pending_s -= seconds
        self._add(Reason.DETECT, seconds, is_recovery=True)

    def recovered(self, step_s: float) -> dict[Reason, float]:
        """A step was committed again, of which one takes `step_s`; returns what the recovery has cost, by reason."""
        given_back = step_s
        cost, self.recovery_s = self.recovery_s, {}
        for reason in reversed(RECOVERY):
            part = min(given_back, cost.get(reason, 0.0))
            if part > 0:
                cost[reason] -= part
                self.productive_s += part
                given_back -= part
        for reason, seconds in cost.items():
            self._settle(reason, seconds)
        return cost

    def written(self, step: int, step_s: float, unix_s: float) -> dict[str, Any]:
        """Return what the ledger needs to go on with these accounts."""
        badput_s = {reason: self.badput_s.get(reason, 0.0) + self.recovery_s.get(reason, 0.0) for reason in Reason}
        return {
            "productive_s": round(self.productive_s, 6),
            "pending_s": round(self.pending_s, 6),
            "away_s": round(self.away_s, 6),
            "badput_s": {str(reason): round(seconds, 6) for reason, seconds in badput_s.items() if seconds},
            "step": step,
            "step_s": step_s,
            "unix_s": unix_s,
        }

    def restore(self, written: Mapping[str, Any]) -> None:
        """Go on where a controller before this one has written last. An incident that was open has no end in the ledger."""
        self.productive_s, self.pending_s, self.away_s = written["productive_s"], written["pending_s"], written["away_s"]
        self.badput_s = {Reason(reason): seconds for reason, seconds in written["badput_s"].items()}
        self.step_then, self.step_s_then = written["step"], written["step_s"]

    def went_away(self, seconds: float) -> None:
        """No controller was here for so long."""
        self.away_s += max(0.0, seconds)

    def came_back(self, step: int) -> None:
        """Workers have come so far meanwhile, also while this controller waited for their agents: that was productive."""
        seconds = min(self.away_s, max(0, step - self.step_then) * self.step_s_then)
        self.productive_s += seconds
        self._settle(Reason.CONTROLLER_AWAY, self.away_s - seconds)
        self.away_s = 0.0

    def ended(self) -> None:
        """Nothing more will be known: what is open is settled as it stands."""
        self.committed()
        for reason, seconds in self.recovery_s.items():
            self._settle(reason, seconds)
        self._settle(Reason.CONTROLLER_AWAY, self.away_s)
        self.recovery_s, self.away_s = {}, 0.0

    def goodput(self, *, last_hour: bool = False) -> float:
        """Return the productive part of the time, between 0 and 1; 0 for a job that has not begun."""
        before = self._before(last_hour)
        elapsed_s = self.elapsed_s - before.elapsed_s
        return min(1.0, max(0.0, self.presumed_s - before.presumed_s) / elapsed_s) if elapsed_s > 0 else 0.0

    def ettr(self, steps: int, step_s: float, *, last_hour: bool = False) -> float:
        """Return the effective training time: what `steps` would take at `step_s` each, as a part of the time (MegaScale)."""
        before = self._before(last_hour)
        elapsed_s = self.elapsed_s - before.elapsed_s
        return min(1.0, max(0, steps - before.steps) * step_s / elapsed_s) if elapsed_s > 0 else 0.0

    def _before(self, last_hour: bool) -> Mark:
        return self.marks[0] if last_hour and self.marks else Mark(0.0, 0.0, 0)
