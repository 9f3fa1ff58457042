"""How long a step of a pipeline takes, and how much memory: the workers' actions, run in a simulated step.

It runs the very lists that the workers run, with the durations that were measured: what a closed form leaves out (uneven
stages, the wait at either end, a message on its way) is in it. One action at a time on each worker; messages travel beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.domain import LayerProfile, Stage
from elastic.pipeline.actions import Action, ActionKind
from elastic.pipeline.paths import Path, Visit, all_visits


@dataclass(frozen=True, slots=True)
class Link:
    """What it takes to send something between two workers.

    Attributes:
        latency_s: of each message. bytes_per_s: of all.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 2e9

    def seconds(self, size_bytes: float) -> float:
        """From the end of an action to the arrival of what it sends."""
        return self.latency_s + size_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a simulated step came to.

    Attributes:
        step_s: until the last worker is done with its reduction.
        busy_s: of each rank, computing.
        memory_bytes: of each rank, the most at any time: state, and activations in flight.
    """

    step_s: float
    busy_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The share of the workers' time in which they wait."""
        total = self.step_s * len(self.busy_s)
        return 1 - sum(self.busy_s) / total if total else 0.0


class _Worker:
    def __init__(self, actions: Sequence[Action], stage: Stage, layers: Sequence[LayerProfile], speed: float) -> None:
        self.actions = actions
        self.at = 0
        self.now = self.busy = 0.0
        self.speed = speed
        self.state_bytes = sum(layer.state_bytes for layer in layers[stage.first : stage.last])
        self.held = self.held_most = 0

    def compute(self, seconds: float) -> None:
        self.now += seconds / self.speed
        self.busy += seconds / self.speed

    def hold(self, size_bytes: int) -> None:
        self.held += size_bytes
        self.held_most = max(self.held_most, self.held)


class _Cost:
    """What a visit costs."""

    def __init__(self, visit: Visit, layers: Sequence[LayerProfile]) -> None:
        own = [layers[number] for number in visit.layers]
        self.forward_s = sum(layer.forward_s for layer in own)
        self.backward_s = sum(layer.backward_s for layer in own)
        self.activation_bytes = sum(layer.activation_bytes for layer in own)
        self.output_bytes = own[-1].output_bytes


def simulate(
    stages: Sequence[Stage],
    actions: Mapping[int, Sequence[Action]],
    layers: Sequence[LayerProfile],
    *,
    speeds: Mapping[int, float] | None = None,
    link: Link | None = None,
    paths: Sequence[Path] = (),
) -> Prediction:
    """Run the actions of all ranks.

    Args:
        stages: in order. actions: of each rank. layers: what each costs. speeds: of each rank, 1.0 where there is none: 0.5
            takes twice as long. link: between any two. paths: of each slot through the layers; none: straight.

    Raises:
        ValueError: the actions wait for each other for ever.
    """
    link, speeds = link or Link(), speeds or {}
    stage_of = {rank: stage for stage in stages for rank in stage.ranks}
    workers = {
        rank: _Worker(actions[rank], stage_of[rank], layers, speeds.get(rank, 1.0)) for rank in sorted(stage_of)
    }
    slots = 1 + max((action.slot for listed in actions.values() for action in listed), default=-1)
    visits = all_visits(stages, slots, paths[:slots])
    found = {visit: _Cost(visit, layers) for way in set(visits) for visit in way}
    ways = {way: [found[visit] for visit in way] for way in set(visits)}
    costs = [ways[way] for way in visits]
    arrived: dict[tuple[ActionKind, int, int], float] = {}  # what arrives, of which slot, for which of its visits
    waiting: dict[tuple[ActionKind, int, int], int] = {}
    ready = list(workers)
    while ready:
        rank = ready.pop()
        worker = workers[rank]
        while worker.at < len(worker.actions):
            action = worker.actions[worker.at]
            match action.kind:
                case ActionKind.RECEIVE_INPUT | ActionKind.RECEIVE_GRADIENT:
                    key = (action.kind, action.slot, action.place)
                    if key not in arrived:
                        waiting[key] = rank
                        break
                    worker.now = max(worker.now, arrived[key])
                case ActionKind.FORWARD:
                    cost = costs[action.slot][action.place]
                    worker.compute(cost.forward_s)
                    worker.hold(cost.activation_bytes)
                case ActionKind.BACKWARD:
                    cost = costs[action.slot][action.place]
                    worker.compute(cost.backward_s)
                    worker.hold(-cost.activation_bytes)
                case ActionKind.SEND_OUTPUT | ActionKind.SEND_GRADIENT:
                    # A gradient is as large as what was sent forward.
                    is_output = action.kind is ActionKind.SEND_OUTPUT
                    kind = ActionKind.RECEIVE_INPUT if is_output else ActionKind.RECEIVE_GRADIENT
                    sent = (kind, action.slot, action.place + (1 if is_output else -1))
                    giver = costs[action.slot][action.place - (0 if is_output else 1)]
                    arrived[sent] = worker.now + link.seconds(giver.output_bytes)
                    if sent in waiting:
                        ready.append(waiting.pop(sent))
                case ActionKind.PASS_BY | ActionKind.REDUCE:
                    pass
            worker.at += 1
    if waiting:
        kind, slot, place = min(waiting)
        raise ValueError(f"rank {waiting[kind, slot, place]} waits for ever to {kind} of slot {slot}")
    ends = []
    for rank, worker in workers.items():
        stage = stage_of[rank]
        width = len(stage.ranks)
        gradient_bytes = worker.state_bytes / 4
        reduce_s = link.seconds(2 * gradient_bytes * (width - 1) / width) if width > 1 else 0.0
        ends.append(worker.now + reduce_s)
    return Prediction(
        max(ends),
        tuple(worker.busy for worker in workers.values()),
        tuple(float(w.state_bytes + w.held_most) for w in workers.values()),
    )
