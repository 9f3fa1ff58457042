"""How long a step of a pipeline takes, and how much memory: the workers' actions, run in a simulated step.

It runs the very lists that the workers run, with the durations that were measured: what a closed form leaves out (uneven
stages, the wait at either end, a message on its way) is in it. One action at a time on each worker; messages travel beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.domain import LayerProfile, Stage
from elastic.pipeline.actions import Action, ActionKind


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
        own = layers[stage.first : stage.last]
        self.actions = actions
        self.at = 0
        self.now = self.busy = 0.0
        self.forward_s = sum(layer.forward_s for layer in own) / speed
        self.backward_s = sum(layer.backward_s for layer in own) / speed
        self.state_bytes = sum(layer.state_bytes for layer in own)
        self.activation_bytes = sum(layer.activation_bytes for layer in own)
        self.held = self.held_most = 0


def simulate(
    stages: Sequence[Stage],
    actions: Mapping[int, Sequence[Action]],
    layers: Sequence[LayerProfile],
    *,
    speeds: Mapping[int, float] | None = None,
    link: Link | None = None,
) -> Prediction:
    """Run the actions of all ranks.

    Args:
        stages: in order. actions: of each rank. layers: what each costs. speeds: of each rank, 1.0 where there is none: 0.5
            takes twice as long. link: between any two.

    Raises:
        ValueError: the actions wait for each other for ever.
    """
    link, speeds = link or Link(), speeds or {}
    stage_of = {rank: stage for stage in stages for rank in stage.ranks}
    workers = {
        rank: _Worker(actions[rank], stage_of[rank], layers, speeds.get(rank, 1.0)) for rank in sorted(stage_of)
    }
    arrived: dict[tuple[ActionKind, int, int], float] = {}
    waiting: dict[tuple[ActionKind, int, int], int] = {}
    ready = list(workers)
    while ready:
        rank = ready.pop()
        worker = workers[rank]
        stage = stage_of[rank]
        while worker.at < len(worker.actions):
            action = worker.actions[worker.at]
            match action.kind:
                case ActionKind.RECEIVE_INPUT | ActionKind.RECEIVE_GRADIENT:
                    key = (action.kind, action.slot, rank)
                    if key not in arrived:
                        waiting[key] = rank
                        break
                    worker.now = max(worker.now, arrived[key])
                case ActionKind.FORWARD:
                    worker.now += worker.forward_s
                    worker.busy += worker.forward_s
                    worker.held += 1
                    worker.held_most = max(worker.held_most, worker.held)
                case ActionKind.BACKWARD:
                    worker.now += worker.backward_s
                    worker.busy += worker.backward_s
                    worker.held -= 1
                case ActionKind.SEND_OUTPUT | ActionKind.SEND_GRADIENT:
                    is_output = action.kind is ActionKind.SEND_OUTPUT
                    boundary = stage.last - 1 if is_output else stage.first - 1
                    kind = ActionKind.RECEIVE_INPUT if is_output else ActionKind.RECEIVE_GRADIENT
                    sent = (kind, action.slot, action.peer)
                    arrived[sent] = worker.now + link.seconds(layers[boundary].output_bytes)
                    if sent in waiting:
                        ready.append(waiting.pop(sent))
                case ActionKind.REDUCE:
                    pass
            worker.at += 1
    if waiting:
        kind, slot, rank = min(waiting)
        raise ValueError(f"rank {rank} waits for ever to {kind} of slot {slot}")
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
        tuple(float(w.state_bytes + w.held_most * w.activation_bytes) for w in workers.values()),
    )
