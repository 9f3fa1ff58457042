"""What comes into the controller's machine and what it answers with: plain frozen values.

The order of effects is the law of the shell: every `Persist` of a step must be durable before any later effect of the
same step is performed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic.domain import AgentHello, AgentMessage, ControllerMessage, EvidenceCollected, Incident
from monitoring.stacks import Examination


@dataclass(frozen=True, slots=True)
class AgentAttached:
    """An agent opened its stream and said who it is."""

    hello: AgentHello


@dataclass(frozen=True, slots=True)
class AgentSaid:
    """A message on the stream of an agent that was welcomed."""

    incarnation: str
    message: AgentMessage


@dataclass(frozen=True, slots=True)
class AgentGone:
    """The stream of a welcomed agent ended."""

    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """A person wants a node to leave."""

    node: str


@dataclass(frozen=True, slots=True)
class SaveAsked:
    """A person wants a checkpoint."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """A person wants the job to end."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


ControllerEvent = AgentAttached | AgentSaid | AgentGone | DrainAsked | SaveAsked | StopAsked | Tick


@dataclass(frozen=True, slots=True)
class Persist:
    """Append to the ledger before anything that follows is performed."""

    kind: str
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToAgent:
    """Send on this agent's stream."""

    incarnation: str
    message: ControllerMessage


@dataclass(frozen=True, slots=True)
class CloseAgent:
    """End this agent's stream."""

    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class EndJob:
    """The job is over; the process may go once every agent is gone."""

    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class KeepEvidence:
    """Keep what was found of all workers when an incident began; it is for people only.

    `nodes` and `answers` belong together, and of `silent` workers nothing was heard.
    """

    incident: Incident
    nodes: tuple[str, ...]
    answers: tuple[EvidenceCollected, ...]
    silent: tuple[str, ...]
    examination: Examination


ControllerEffect = Persist | ToAgent | CloseAgent | EndJob | KeepEvidence
