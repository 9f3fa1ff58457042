"""The book of incidents: what happened, how it was found, and what it cost once the job was whole again. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from elastic.domain import Incident
from monitoring.goodput import incident_cost_s

INCIDENTS_KEPT = 200


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
    """

    def __init__(self) -> None:
        self.total = 0
        self.seconds_lost = 0.0
        self._closed: deque[Incident] = deque(maxlen=INCIDENTS_KEPT)
        self._open: list[_Open] = []

    @property
    def has_open(self) -> bool:
        return bool(self._open)

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

    def restore(self, incident: Incident) -> None:
        """Take a closed incident from the ledger."""
        self.restore_number(incident.number or self.total + 1)
        self._keep(incident)

    def restore_number(self, number: int) -> None:
        """Take from the ledger that there was an incident of this number, closed or not."""
        self.total = max(self.total, number)

    def _keep(self, incident: Incident) -> None:
        self.seconds_lost += max(0.0, incident.seconds_lost)
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
