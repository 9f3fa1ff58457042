"""What comes into the agent's machine and what it answers with: plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.domain import (
    NO_STEP,
    AgentMessage,
    AssembleSnapshot,
    CheckpointFound,
    CheckpointSaved,
    CollectEvidence,
    ControllerMessage,
    EvidenceCollected,
    FindCheckpoint,
    FindSnapshots,
    PeersProbed,
    ProbePeers,
    SaveCheckpoint,
    SnapshotAssembled,
    SnapshotsFound,
    StartWorker,
    WorkerCommand,
    WorkerMessage,
)
from elastic.progress import Operation

Order = ProbePeers | FindSnapshots | AssembleSnapshot | FindCheckpoint | SaveCheckpoint | CollectEvidence
"""What the controller asks for that takes time ..."""
Answer = PeersProbed | SnapshotsFound | SnapshotAssembled | CheckpointFound | CheckpointSaved | EvidenceCollected
"""... and its answers."""

# Events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """A stream to the controller is open: say Hello."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The stream to the controller ended, or could not be opened."""

    reason: str


@dataclass(frozen=True, slots=True)
class Heard:
    """The controller said something."""

    message: ControllerMessage


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker process exists."""

    worker: str
    pid: int


@dataclass(frozen=True, slots=True)
class ForkFailed:
    """A worker process could not be made."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    """A worker said something for the controller."""

    worker: str
    message: WorkerMessage


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A worker's process is gone; `code` as in subprocess (-N for signal N)."""

    worker: str
    code: int
    detected_by: str = "pidfd"


@dataclass(frozen=True, slots=True)
class Looked:
    """What the shell read about a worker: its process state (letter of /proc/PID/stat) and its progress page.

    `busy_until_s` is on the clock of `now`; `operation` is what it began last, where that is known.
    """

    worker: str
    process_state: str
    generation: int
    committed: int
    progress: int
    loss: float
    samples: int
    busy_until_s: float = 0.0
    waits: bool = False
    stable: int = NO_STEP
    compute_s: float = 0.0
    gradient_norm: float = 0.0
    operation: Operation | None = None
    evaluated_s: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """An order of the controller has been carried out; this is its answer."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class EndAsked:
    """A person or the system wants this agent to end (SIGTERM, SIGINT)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


AgentEvent = (
    Connected
    | Disconnected
    | Heard
    | Forked
    | ForkFailed
    | WorkerSaid
    | ProcessEnded
    | Looked
    | CarriedOut
    | EndAsked
    | Tick
)


# Effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fork:
    """Start a worker from the warm standby."""

    order: StartWorker


@dataclass(frozen=True, slots=True)
class Signal:
    """Signal a worker's whole process group."""

    worker: str
    signum: int
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Send to the controller."""

    message: AgentMessage


@dataclass(frozen=True, slots=True)
class Forward:
    """Send to a worker."""

    worker: str
    command: WorkerCommand


@dataclass(frozen=True, slots=True)
class OpenGeneration:
    """Keys of older generations vanish from the rendezvous store."""

    generation: int


@dataclass(frozen=True, slots=True)
class CarryOut:
    """Do what the controller asks for beside everything else; then say CarriedOut."""

    order: Order


@dataclass(frozen=True, slots=True)
class DropConnection:
    """Close the stream to the controller; the shell opens another."""

    reason: str


@dataclass(frozen=True, slots=True)
class EndAgent:
    """Exit with this code; all workers are gone."""

    code: int
    reason: str


AgentEffect = Fork | Signal | Report | Forward | OpenGeneration | CarryOut | DropConnection | EndAgent
