"""The book of incidents: what happened, how it was found, and what it cost once the job was whole again. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from elastic.domain import Incident
from monitoring.accounts import RECOVERY, Reason
from monitoring.histograms import Histogram
from monitoring.steps import incident_cost_s

INCIDENTS_KEPT = 200
RECOVERY_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(slots=True)
class _Open:
    """An incident whose cost is not known yet."""

    incident: Incident
    began_at: float


class IncidentBook:
    """Incidents of one job; the newest are kept, all are counted.

    Attributes:
        total: Incidents so far, the open ones included.
        seconds_lost: Sum of what the closed ones cost.
        steps_redone: Sum of the steps that they had redone.
        kinds: (kind, detected by) -> how many were closed.
        phases: What recoveries have cost, by reason; incidents that were open together are one recovery.
        recoveries: How many there were.
    """

    def __init__(self) -> None:
        self.total = 0
        self.seconds_lost = 0.0
        self.steps_redone = 0
        self.kinds: Counter[tuple[str, str]] = Counter()
        self.phases = {reason: Histogram(RECOVERY_BUCKETS_S) for reason in RECOVERY}
        self.recoveries = 0
        self._closed: deque[Incident] = deque(maxlen=INCIDENTS_KEPT)
        self._open: list[_Open] = []

    @property
    def has_open(self) -> bool:
        return bool(self._open)

    @property
    def open_count(self) -> int:
        return len(self._open)

    def open(self, incident: Incident, began_at: float) -> Incident:
        """Begin an incident, and return it with its number; a silence began before it was believed."""
        self.total += 1
        incident = replace(incident, number=self.total)
        self._open.append(_Open(incident, began_at))
        return incident

    def regrouped(self, generation: int, step: int, steps_redone: int) -> None:
        """Note with which generation, after which step, the open ones go on."""
        for entry in self._open:
            entry.incident = replace(
                entry.incident, generation=generation, step=step, steps_redone=steps_redone
            )

    def close(self, now: float, step_s: float) -> list[Incident]:
        """Close the open ones, since a new step has been committed, and return them with their costs."""
        closed = [
            replace(entry.incident, seconds_lost=incident_cost_s(entry.began_at, now, step_s))
            for entry in self._open
        ]
        self._open = []
        for incident in closed:
            self._keep(incident)
        return closed

    def note_phases(self, phases: Mapping[Reason, float]) -> None:
        """Take what one recovery has cost, by reason."""
        self.recoveries += 1
        for reason, seconds in phases.items():
            if seconds > 0:
                self.phases[reason].observe(seconds)

    def restore(self, incident: Incident, phases: Mapping[str, float]) -> None:
        """Take a closed incident from the ledger, and what the recovery has cost if it is told with this one."""
        self.restore_number(incident.number or self.total + 1)
        self._keep(incident)
        if phases:
            self.note_phases({Reason(reason): seconds for reason, seconds in phases.items()})

    def restore_number(self, number: int) -> None:
        """Take from the ledger that there was an incident of this number, closed or not."""
        self.total = max(self.total, number)

    def _keep(self, incident: Incident) -> None:
        self.seconds_lost += max(0.0, incident.seconds_lost)
        self.steps_redone += incident.steps_redone
        self.kinds[incident.kind, incident.detected_by] += 1
        self._closed.append(incident)

    def newest(self) -> tuple[Incident, ...]:
        """Return what is kept, oldest first, the open ones last."""
        return (*self._closed, *(entry.incident for entry in self._open))


def describe(incident: Incident) -> str:
    """Return a closed incident in one line."""
    return (
        f"{incident.kind}: {incident.subject} ({incident.reason}), found by {incident.detected_by}, "
        f"{incident.seconds_lost:.2f} s lost, {incident.steps_redone} step(s) redone"
    )
