"""What the controller knows of nodes, workers and generations: plain values that only the machine's parts change.

Each kind of value says what it means, and answers what follows from itself alone; `job.py` holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic.domain import (
    EvidenceCollected,
    Failed,
    Incident,
    Leaving,
    Member,
    Plan,
    PlanKind,
    Prepared,
    SnapshotHolding,
    TrainingSpec,
    WorkerStatus,
)
from elastic.snapshots import SnapshotId
from recovery.ladder import Restore


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What the job was started with; fixed for its life and kept in the ledger.

    Attributes:
        job: Name of the job; agents of other jobs are refused.
        nodes_min, nodes_max: Nodes without which the job waits, and beyond which it refuses.
        max_restarts: Restarts of one worker place (node, local rank) that ended by its own fault.
        failure_timeout_s: Longest silence that is believed; every other protocol deadline derives from it.
        start_timeout_s: Longest wait for the first world.
        hang_timeout_s: Longest time without progress in the user's code; 0: derived from the steps seen.
        join_timeout_s: With nodes_min present, how long the first world waits for nodes_max.
        snapshot_every: Steps from one snapshot in memory to the next; 0: none are taken, -1: as often as is cheap.
        data_shards, parity_shards: Of the erasure code that protects snapshots; no parity: they are not protected.
        checkpoint_target: Directory, or an address of fsspec, for checkpoints; empty for none.
        checkpoint_every: Steps from one checkpoint to the next; 0: only when asked.
        checkpoint_keep: How many of them stay.
        approximate: Whether lost stages may be made from their neighbours, where nothing exact can be had.
        norm_exponent: To which gradient norms are raised where they weigh neighbours.
        averages_moments: Whether what is made so has an average of the state of optimizers, too, and not a fresh one.
        swap_ends: Whether half of a pipeline's slots pass the blocks at its ends in swapped order, and layers without a like are
            kept in duplicate.
        skip_ratio: Share of a pipeline's stages that each slot passes by.
        flops_per_sample: Floating-point operations that training on one sample takes; 0: not known.
        peak_flops: What one worker's devices can do in a second; 0: not known.
        token: What agents must show; empty where none is required.
    """

    job: str
    nodes_min: int = 1
    nodes_max: int = 1
    max_restarts: int = 3
    failure_timeout_s: float = 2.0
    start_timeout_s: float = 600.0
    hang_timeout_s: float = 0.0
    join_timeout_s: float = 30.0
    snapshot_every: int = 0
    data_shards: int = 0
    parity_shards: int = 0
    checkpoint_target: str = ""
    checkpoint_every: int = 0
    checkpoint_keep: int = 2
    approximate: bool = False
    norm_exponent: float = 1.0
    averages_moments: bool = False
    swap_ends: bool = False
    skip_ratio: float = 0.0
    flops_per_sample: float = 0.0
    peak_flops: float = 0.0
    token: str = field(default="", repr=False)

    @property
    def prepare_timeout_s(self) -> float:
        """Preparing a generation may take this long before the missing ones are taken for lost."""
        return 2.5 * self.failure_timeout_s

    def build_timeout_s(self, kind: PlanKind) -> float:
        """Building its group may take this long: longer where nobody's training waits for it."""
        return self.failure_timeout_s if kind is PlanKind.FENCE else 2 * self.failure_timeout_s


@dataclass(slots=True)
class Node:
    """A node as the controller knows it."""

    id: str
    incarnation: str
    nproc: int
    pid: int
    peer_address: str
    worker_address: str
    heard_at: float
    domain: str = ""  # its failure domain; empty: one of its own
    island: str = ""  # whose workers train one replica between them, with local rounds; empty: each trains one
    data_key: str = ""  # the public CURVE key of its keeper
    state: str = "attached"  # attached, draining, lost, left
    restarts: dict[int, int] = field(default_factory=dict)
    waits_since: float | None = None  # since when it is drained, and stays for the sake of what it holds
    shut_down: bool = False  # its agent was told that it has left
    cut_from: frozenset[str] = frozenset()  # nodes that it cannot reach, for which it was left out until it can

    @property
    def attached(self) -> bool:
        return self.state in ("attached", "draining")


@dataclass(slots=True)
class Worker:
    """A worker process as the controller knows it."""

    id: str
    node: str
    local_rank: int
    pid: int = 0
    state: str = "starting"  # starting, registered, warming, warm, member, finished, left, dead, or lost: see alive
    spec: TrainingSpec | None = None
    holds_state: bool = False
    status: WorkerStatus = field(default_factory=WorkerStatus)
    failure: Failed | None = None
    leaving: Leaving | None = None
    switch_failures: int = 0
    warms_slowly: bool = False  # a switch was given up because it was not warm in time

    @property
    def alive(self) -> bool:
        """Whether the job counts on it; one that is `lost` with its node may live, and is taken back only at need."""
        return self.state not in ("finished", "left", "dead", "lost")


@dataclass(slots=True)
class Attempt:
    """A generation on its way."""

    plan: Plan
    deadline: float
    prepared: dict[str, Prepared] = field(default_factory=dict)
    committed: bool = False
    switched: set[str] = field(default_factory=set)
    leavers: tuple[Member, ...] = ()  # members of the world before, who leave with this switch
    snapshot: SnapshotId | None = None  # from which all who go on read the state, since nobody holds it
    replaces: int = 0  # generation in which the participants train until they have adopted this one
    waits_for_nodes: bool = False  # prepared by all, but fewer nodes than the job asks for

    @property
    def participants(self) -> frozenset[str]:
        return self.plan.workers() | {member.worker for member in self.leavers}

    @property
    def may_be_abandoned(self) -> bool:
        """Whether giving it up costs nothing: the members train on in their world until a switch is committed."""
        return self.plan.kind is PlanKind.SWITCH and not self.committed


@dataclass(slots=True)
class Probing:
    """Nodes were asked which of their peers answer.

    Attributes:
        generation: That is in doubt.
        reason: Why it is.
        asked: Node -> the peers that it was to ask.
        answers: Node -> the peers that did not answer it.
        deadline: When those that have not answered by then are no longer waited for.
        then_fence: Whether the world is fenced anew if no pair is found that explains the doubt.
        suspected: The pairs that a first round found, if this is the second one; only what both find is dead.
    """

    generation: int
    reason: str
    asked: dict[str, frozenset[str]]
    deadline: float
    then_fence: bool
    suspected: frozenset[tuple[str, str]] | None = None
    answers: dict[str, frozenset[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Restoring:
    """Nobody holds the state any more, and it is brought back from the nodes' memory.

    Attributes:
        number: Of this search; answers to others are late.
        reason: Why nobody holds it.
        since: When it was lost.
        asked: Incarnations of agents that were asked what they hold ...
        found: ... and what they said.
        looks_in: Incarnation of the agent that looks for a checkpoint, if one is needed ...
        passed_over: ... and why one is, in words.
        choice: What is restored, once that is decided ...
        snapshot: ... which one that is ...
        checkpoint: ... where it lies, if it is not in memory ...
        chosen_at: ... and when it was decided.
        ordered: Incarnations of agents that were told to make it readable for their workers ...
        assembled, refusals: ... that have, and that could not, with their reasons.
    """

    number: int
    reason: str
    since: float
    asked: set[str] = field(default_factory=set)
    found: dict[str, tuple[SnapshotHolding, ...]] = field(default_factory=dict)
    looks_in: str = ""
    passed_over: str = ""
    choice: Restore | None = None
    snapshot: SnapshotId | None = None
    checkpoint: str = ""
    chosen_at: float = 0.0
    ordered: set[str] = field(default_factory=set)
    assembled: set[str] = field(default_factory=set)
    refusals: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saving:
    """A checkpoint is being written by the agent of this incarnation."""

    number: int
    incarnation: str
    since: float


@dataclass(slots=True)
class Inquiry:
    """Agents were asked where their workers are.

    Attributes:
        number: Of this inquiry; answers to others are late.
        subjects: What incidents are about that may claim it.
        workers: Those that were alive when it began.
        asked: Node -> incarnation of its agent.
        deadline: When those that have not answered by then are no longer waited for.
        forget_at: When nothing can claim it any more.
        answers: Node -> what its agent has found.
        is_over: Whether no more answers are taken.
        claims: Incidents that it is to be kept for, and is not yet.
    """

    number: int
    subjects: set[str]
    workers: frozenset[str]
    asked: dict[str, str]
    deadline: float
    forget_at: float
    answers: dict[str, EvidenceCollected] = field(default_factory=dict)
    is_over: bool = False
    claims: list[Incident] = field(default_factory=list)


@dataclass(slots=True)
class Standstill:
    """All members wait for others and nothing moves.

    Attributes:
        seen: What their statuses said, which must stay as it is.
        since, probed_at: Seconds.
        is_looked_into: Whether agents were asked where their workers are.
    """

    seen: tuple[tuple[str, int, int], ...]
    since: float
    probed_at: float
    is_looked_into: bool = False


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A generation broke at a worker, and no loss that explains it is known yet."""

    generation: int
    reason: str
    since: float


def natural(text: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts node10 after node9."""
    parts: list[tuple[int, int | str]] = []
    digits = ""
    for char in text + "\0":
        if char.isdigit():
            digits += char
            continue
        if digits:
            parts.append((0, int(digits)))
            digits = ""
        parts.append((1, char))
    return tuple(parts)
