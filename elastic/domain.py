"""The words of the runtime as values: what controller, agents and workers say to each other.

Every class here mirrors one message of `proto/elastic/v1/runtime.proto`, where each field is documented; the machines
speak these values and never protobuf. They are frozen, hold no references to anything that changes, and know nothing
of clocks, sockets or processes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

PROTOCOL_VERSION = 1
FRESH_STEP = 0  # `committed` of a replica that has not trained yet
NO_STEP = -1  # `stable` where no snapshot is


class PlanKind(enum.IntEnum):
    """How a world begins."""

    UNSPECIFIED = 0
    FOUND = 1
    FENCE = 2
    SWITCH = 3


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """What one layer of a pipeline costs: seconds and bytes for one slot, bytes of state whatever the slots.

    `state_bytes` are those of parameters, gradients and what an optimizer like Adam holds; `activation_bytes` what is kept
    between a forward and its backward; `output_bytes` what goes on to the next layer. `form` is alike for layers whose tensors
    have the same names, shapes and dtypes, and 0 for those without any. `changes_buffers`: training changes buffers of it.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    state_bytes: int = 0
    activation_bytes: int = 0
    output_bytes: int = 0
    form: int = 0
    changes_buffers: bool = False

    def times(self, count: int) -> LayerProfile:
        """What the layer costs where a slot has so many batches, one after the other."""
        return replace(self, forward_s=self.forward_s * count, backward_s=self.backward_s * count)


WORKERS_MAX = 2**20
"""More workers than any job has."""


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """What a worker is about to train; all workers of a job must agree on it."""

    slots: int = 0
    virtual_replicas: int = 0
    reduction: str = "ordered"
    seed: int = 0
    dataset_size: int = 0
    batch_size: int = 0
    shuffle: bool = False
    drop_last: bool = False
    layout_digest: str = ""
    state_digest: str = ""
    data_digest: str = ""
    numerics: str = ""
    shard_optimizer: bool = False
    schedule: str = ""
    stages: int = 0
    memory_bytes: int = 0
    layers: tuple[LayerProfile, ...] = ()
    sync: str = ""
    crews: bool = False

    @property
    def is_pipeline(self) -> bool:
        """Whether the model is cut into stages."""
        return bool(self.layers)

    @property
    def holds_parts(self) -> bool:
        """Whether a worker holds something of the state that others do not."""
        return self.is_pipeline or self.shard_optimizer

    @property
    def seats(self) -> int:
        """How many workers can have something to do, once the slots are fixed: each a slot at some stage, or a part of one."""
        if self.crews:
            return WORKERS_MAX
        return self.slots * (self.stages or len(self.layers) or 1)

    def difference(self, other: TrainingSpec, *, with_state: bool) -> str:
        """Return the first difference in words, or "" when both train the same thing.

        `with_state` compares the initial bits too: founders must start equal, joiners are given the state.
        """
        for name, words in _SPEC_WORDS.items():
            if name == "state_digest" and not with_state:
                continue
            if name == "numerics" and self.reduction != "ordered":
                continue
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{words} differ: {mine} here, {theirs} in the job"
        return ""


_SPEC_WORDS = {
    "slots": "the requested slots",
    "virtual_replicas": "the requested virtual replicas",
    "reduction": "the reductions",
    "seed": "the seeds",
    "dataset_size": "the lengths of the dataset",
    "batch_size": "the batch sizes",
    "shuffle": "the shuffle settings",
    "drop_last": "the drop_last settings",
    "shard_optimizer": "the shard_optimizer settings",
    "sync": "the sync settings",
    "schedule": "the schedules of the pipeline",
    "stages": "the requested stages",
    "memory_bytes": "the memories that a worker has for its stage",
    "layout_digest": "names, shapes or dtypes of the parameters or buffers",
    "data_digest": "the first samples of the dataset",
    "numerics": 'what bits depend on (use the same everywhere, or reduction="fast")',
    "state_digest": "the initial parameters or buffers (seed the model's construction on every worker alike)",
}


# What a worker says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Registered:
    spec: TrainingSpec = field(default_factory=TrainingSpec)


@dataclass(frozen=True, slots=True)
class Warm:
    pass


@dataclass(frozen=True, slots=True)
class Prepared:
    generation: int = 0
    committed: int = 0
    voted: int = 0
    has_state: bool = False
    stop_after: int = 0
    dealt: int = 0


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    generation: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Switched:
    generation: int = 0
    committed: int = 0


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a layer that was made from others is expected to be from the one that was lost, over its norm."""

    layer: int = 0
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Resumed:
    generation: int = 0
    committed: int = 0
    errors: tuple[LayerError, ...] = ()


@dataclass(frozen=True, slots=True)
class CollectiveFailed:
    generation: int = 0
    step: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Leaving:
    committed: int = 0
    digest: str = ""
    samples: int = 0
    concludes: bool = False


@dataclass(frozen=True, slots=True)
class Concluded:
    committed: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    step: int = 0
    slot: int = -1
    error: str = ""
    traceback: str = ""
    sample_ids: tuple[int, ...] = ()


WorkerMessage = (
    Registered | Warm | Prepared | PrepareFailed | Switched | Resumed | CollectiveFailed | Leaving | Concluded | Failed
)


# What a worker is told --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    worker: str = ""
    node: str = ""
    rank: int = 0
    local_rank: int = 0
    address: str = ""


@dataclass(frozen=True, slots=True)
class PlanNode:
    node: str = ""
    domain: str = ""
    peer_address: str = ""
    data_key: str = ""
    island: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive layers of a pipeline, `first` to before `last`, and the ranks that each hold all of them."""

    first: int = 0
    last: int = 0
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerMove:
    """Layers that go from ranks that hold them to others; each source gives a share."""

    first: int = 0
    last: int = 0
    sources: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Blend:
    """A layer that nobody has any more, as the weighted average of others; with `moments` that of its optimizer's state, too."""

    layer: int = 0
    sources: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    moments: bool = False


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A layer that was made so, and the newest step then."""

    layer: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class LayerPath:
    """Layers of a pipeline in the order in which a slot passes them, maybe not all."""

    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerCopy:
    """Layers, `first` to before `last`, that ranks of another stage than theirs keep up with, to have them if it is lost."""

    first: int = 0
    last: int = 0
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Who owns what in one generation, and why."""

    generation: int = 0
    kind: PlanKind = PlanKind.UNSPECIFIED
    members: tuple[Member, ...] = ()
    owners: tuple[int, ...] = ()
    virtual_replicas: int = 0
    store_node: str = ""
    store_address: str = ""
    prepare_timeout_ms: int = 0
    reason: str = ""
    nodes: tuple[PlanNode, ...] = ()
    data_shards: int = 0
    parity_shards: int = 0
    stages: tuple[Stage, ...] = ()
    routes: tuple[int, ...] = ()
    moves: tuple[LayerMove, ...] = ()
    predicted_s: float = 0.0
    blends: tuple[Blend, ...] = ()
    rebuilt: tuple[Rebuilt, ...] = ()
    paths: tuple[LayerPath, ...] = ()
    path_of: tuple[int, ...] = ()
    copies: tuple[LayerCopy, ...] = ()

    @property
    def slots(self) -> int:
        return len(self.owners)

    def crews(self) -> list[tuple[str, ...]]:
        """The workers of each island, in the order of their ranks; without an island a worker is one by itself."""
        islands = {node.node: node.island for node in self.nodes}
        crews: dict[tuple[str, str], list[str]] = {}
        for member in self.members:
            island = islands.get(member.node, "")
            crews.setdefault((island, "" if island else member.worker), []).append(member.worker)
        return [tuple(crew) for crew in crews.values()]

    def stage_of(self, rank: int) -> int:
        """Number of a rank's stage. Raises ValueError where it has none."""
        for number, stage in enumerate(self.stages):
            if rank in stage.ranks:
                return number
        raise ValueError(f"rank {rank} of generation {self.generation} is in no stage")

    def layers_of(self, rank: int) -> range:
        """The layers of a pipeline that a rank holds."""
        stage = self.stages[self.stage_of(rank)]
        return range(stage.first, stage.last)

    def holders_of(self, layer: int) -> tuple[int, ...]:
        """The ranks whose stage has a layer of a pipeline."""
        return next(stage.ranks for stage in self.stages if stage.first <= layer < stage.last)

    def keepers_of(self, layer: int) -> tuple[int, ...]:
        """All ranks that hold a layer: those of its stage, and those that keep up with it; in order."""
        copied = (rank for copy in self.copies if copy.first <= layer < copy.last for rank in copy.ranks)
        return tuple(sorted({*self.holders_of(layer), *copied}))

    def copied_by(self, rank: int) -> tuple[int, ...]:
        """The layers of other stages that a rank keeps up with."""
        return tuple(n for copy in self.copies if rank in copy.ranks for n in range(copy.first, copy.last))

    def held_by(self, rank: int) -> tuple[int, ...]:
        """All layers that a rank holds: its stage's, and those of others that it keeps up with."""
        return (*self.layers_of(rank), *self.copied_by(rank))

    @property
    def is_recut(self) -> bool:
        """Whether a lost stage is made good for: layers move among those who are left, and what nobody has is made."""
        return self.kind is PlanKind.FENCE and bool(self.blends or self.moves)

    def is_given_layers(self, rank: int) -> bool:
        """Whether a rank has yet to be given some of its layers, or to make them from others."""
        if any(rank in move.targets for move in self.moves):
            return True
        return bool(self.blends) and any(blend.layer in self.held_by(rank) for blend in self.blends)

    def route(self, slot: int) -> tuple[int, ...]:
        """The rank that runs a slot at each stage, in order."""
        width = len(self.stages)
        return self.routes[slot * width : (slot + 1) * width]

    def all_routes(self) -> tuple[tuple[int, ...], ...]:
        """The routes of all slots."""
        return tuple(self.route(slot) for slot in range(self.slots))

    def all_paths(self) -> tuple[tuple[int, ...], ...]:
        """The layers that each slot passes; none where all go straight."""
        return tuple(self.paths[number].layers for number in self.path_of)

    @property
    def world_size(self) -> int:
        return len(self.members)

    def rank_of(self, worker: str) -> int | None:
        """Rank of a worker in this world; None when the plan leaves it out."""
        for member in self.members:
            if member.worker == worker:
                return member.rank
        return None

    def workers(self) -> frozenset[str]:
        return frozenset(member.worker for member in self.members)


@dataclass(frozen=True, slots=True)
class Admitted:
    slots: int = 0
    virtual_replicas: int = 0
    reduction: str = "ordered"
    seed: int = 0
    committed: int = 0
    joins_running_world: bool = False
    snapshot_every: int = 0
    measures_norms: bool = False


@dataclass(frozen=True, slots=True)
class Prepare:
    plan: Plan = field(default_factory=Plan)


@dataclass(frozen=True, slots=True)
class Commit:
    generation: int = 0
    restore_step: int = 0
    joiner_ranks: tuple[int, ...] = ()
    stop_after: int = 0
    snapshot_generation: int = 0
    restores_per_s: float = 0.0
    kept_deal: int = 0


@dataclass(frozen=True, slots=True)
class Abandon:
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Conclude:
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Finish:
    reason: str = ""


WorkerCommand = Admitted | Prepare | Commit | Abandon | Conclude | Finish


# Agent and controller ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    worker: str = ""
    local_rank: int = 0
    pid: int = 0
    generation: int = 0
    committed: int = 0
    progress: int = 0
    loss: float = float("nan")
    samples: int = 0
    exited: bool = False
    exit_reason: str = ""
    messages: tuple[WorkerMessage, ...] = ()
    waits: bool = False
    stable: int = NO_STEP
    compute_s: float = 0.0
    gradient_norm: float = 0.0
    evaluated_s: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AgentHello:
    job: str = ""
    node: str = ""
    incarnation: str = ""
    protocol_version: int = PROTOCOL_VERSION
    token: str = field(default="", repr=False)
    pid: int = 0
    nproc: int = 1
    peer_address: str = ""
    worker_address: str = ""
    highest_generation: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    workers: tuple[WorkerStatus, ...] = ()
    data_key: str = ""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    sequence: int = 0
    workers: tuple[WorkerStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    worker: str = ""
    local_rank: int = 0
    pid: int = 0


@dataclass(frozen=True, slots=True)
class WorkerExited:
    worker: str = ""
    code: int = 0
    reason: str = ""
    blameless: bool = False
    detected_by: str = ""
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FromWorker:
    worker: str = ""
    message: WorkerMessage = field(default_factory=Warm)


@dataclass(frozen=True, slots=True)
class Goodbye:
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PeersProbed:
    generation: int = 0
    unreachable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Suspected:
    worker: str = ""
    reason: str = ""
    detected_by: str = ""


@dataclass(frozen=True, slots=True)
class CollectEvidence:
    inquiry: int = 0
    timeout_ms: int = 0
    size_bytes_max: int = 0


@dataclass(frozen=True, slots=True)
class StackFrame:
    function: str = ""
    file: str = ""
    line: int = 0
    code: str = ""
    of_user: bool = False


@dataclass(frozen=True, slots=True)
class ThreadStack:
    """Where one thread is; the innermost frame comes first."""

    pid: int = 0
    thread: str = ""
    is_main: bool = False
    frames: tuple[StackFrame, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerEvidence:
    """Where one worker is, and what it began last; its main thread's stack comes first."""

    worker: str = ""
    pid: int = 0
    process_state: str = ""
    operation: str = ""
    step: int = 0
    slot: int = -1
    waits: bool = False
    since_s: float = 0.0
    stacks: tuple[ThreadStack, ...] = ()
    source: str = ""
    fault: str = ""
    log_tail: str = ""


@dataclass(frozen=True, slots=True)
class EvidenceCollected:
    inquiry: int = 0
    workers: tuple[WorkerEvidence, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotHolding:
    step: int = 0
    generation: int = 0
    slices: tuple[int, ...] = ()
    parity: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotsFound:
    search: int = 0
    holdings: tuple[SnapshotHolding, ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotAssembled:
    search: int = 0
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    number: int = 0
    step: int = 0
    path: str = ""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointFound:
    search: int = 0
    path: str = ""
    step: int = 0
    generation: int = 0
    passed_over: tuple[str, ...] = ()
    refusal: str = ""


AgentMessage = (
    AgentHello
    | Heartbeat
    | WorkerStarted
    | WorkerExited
    | FromWorker
    | Goodbye
    | PeersProbed
    | SnapshotsFound
    | SnapshotAssembled
    | CheckpointSaved
    | CheckpointFound
    | Suspected
    | EvidenceCollected
)


@dataclass(frozen=True, slots=True)
class Welcome:
    keep: tuple[str, ...] = ()
    failure_timeout_ms: int = 2000
    highest_generation: int = 0
    hang_timeout_ms: int = 0
    start_timeout_ms: int = 600_000


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: str = ""
    local_rank: int = 0
    rank_hint: int = 0
    world_size_hint: int = 1


@dataclass(frozen=True, slots=True)
class KillWorker:
    worker: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ToWorker:
    worker: str = ""
    command: WorkerCommand = field(default_factory=Finish)


@dataclass(frozen=True, slots=True)
class Shutdown:
    reason: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class HeartbeatAck:
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Peer:
    node: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True)
class ProbePeers:
    generation: int = 0
    peers: tuple[Peer, ...] = ()
    timeout_ms: int = 0


@dataclass(frozen=True, slots=True)
class FindSnapshots:
    search: int = 0


@dataclass(frozen=True, slots=True)
class SliceSource:
    slice: int = 0
    node: str = ""


@dataclass(frozen=True, slots=True)
class AssembleSnapshot:
    search: int = 0
    step: int = 0
    generation: int = 0
    slices: int = 0
    sources: tuple[SliceSource, ...] = ()
    decoded: tuple[str, ...] = ()
    world: Plan = field(default_factory=Plan)
    nodes: tuple[PlanNode, ...] = ()
    checkpoint: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    number: int = 0
    target: str = ""
    keep: int = 0


@dataclass(frozen=True, slots=True)
class FindCheckpoint:
    search: int = 0
    target: str = ""


ControllerMessage = (
    Welcome
    | Refused
    | StartWorker
    | KillWorker
    | ToWorker
    | Shutdown
    | HeartbeatAck
    | ProbePeers
    | FindSnapshots
    | AssembleSnapshot
    | SaveCheckpoint
    | FindCheckpoint
    | CollectEvidence
)


# What people see --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerView:
    worker: str = ""
    rank: int = 0
    local_rank: int = 0
    pid: int = 0
    state: str = ""
    generation: int = 0
    committed: int = 0


@dataclass(frozen=True, slots=True)
class NodeView:
    id: str = ""
    state: str = ""
    agent_pid: int = 0
    address: str = ""
    heartbeat_age_s: float = 0.0
    workers: tuple[WorkerView, ...] = ()


@dataclass(frozen=True, slots=True)
class Incident:
    kind: str = ""
    subject: str = ""
    detected_by: str = ""
    reason: str = ""
    generation: int = 0
    step: int = 0
    steps_redone: int = 0
    seconds_lost: float = -1.0
    at_unix_s: float = 0.0
    number: int = 0


@dataclass(frozen=True, slots=True)
class StatusReply:
    job: str = ""
    state: str = ""
    reason: str = ""
    generation: int = 0
    step: int = 0
    world_size: int = 0
    nodes: tuple[NodeView, ...] = ()
    slots: int = 0
    virtual_replicas: int = 0
    samples: int = 0
    loss: float = float("nan")
    elapsed_s: float = 0.0
    productive_s: float = 0.0
    incidents_total: int = 0
    incidents: tuple[Incident, ...] = ()
    digest: str = ""
    step_s: float = 0.0
    controller_pid: int = 0
    reduction: str = ""
    stable: int = NO_STEP
    saved: int = NO_STEP
    save_fault: str = ""
    is_vulnerable: bool = False
    vulnerable_s: float = 0.0
    approximations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EvidenceReply:
    path: str = ""
    summary: str = ""
    json: str = ""


@dataclass(frozen=True, slots=True)
class PlanReply:
    """How a pipeline is cut at present, what its steps have taken of late, and what there is for a loss."""

    spec: TrainingSpec = field(default_factory=TrainingSpec)
    plan: Plan = field(default_factory=Plan)
    step_s: float = 0.0
    takes_snapshots: bool = False
    keeps_checkpoints: bool = False
    approximates: bool = False
    norm_exponent: float = 1.0
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the job's history, as people read it."""

    sequence: int = 0
    at_unix_s: float = 0.0
    kind: str = ""
    text: str = ""
    json: str = ""
