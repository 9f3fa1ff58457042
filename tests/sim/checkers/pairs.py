"""Whoever goes on together has taken each step from the same world's reduction: so no pair of NoLoCo's is half applied.

Pairs, and what their two sides know of each other, are of one generation. If one side had committed a round as part of a pair and
the other by itself, or with somebody else, they would have taken it from different generations and then meet in a later world.
"""

from __future__ import annotations

from elastic.protocol import EnterWorld
from elastic.sync.pairs import ALONE, partners_of
from tests.sim.clock import Violation
from tests.sim.worker import Worker

Step = tuple[int, int, str]  # generation, rank of the partner, worker that it is


class Pairs:
    """Of each step that a worker has committed since it was given its state: in which world, and with whom."""

    def __init__(self) -> None:
        self._voted: dict[str, tuple[int, Step]] = {}
        self._taken: dict[str, dict[int, Step]] = {}
        self._met: dict[int, dict[str, dict[int, Step]]] = {}  # generation -> worker -> what it had taken

    def on_reduced(self, worker: Worker, step: int, _: object) -> None:
        plan = worker.plan
        assert plan is not None
        partner = partners_of(0, plan.generation, step, plan.world_size)[worker.rank]
        name = "" if partner == ALONE else plan.members[partner].worker
        self._voted[worker.id] = step, (plan.generation, partner, name)

    def on_applied(self, worker: Worker, step: int, _: object) -> None:
        of, taken = self._voted[worker.id]
        if of != step:
            raise Violation(f"worker {worker.id} applies step {step}, and what it has reduced is step {of}")
        self._taken.setdefault(worker.id, {})[step] = taken

    def on_received(self, worker: Worker) -> None:
        self._taken[worker.id] = {}

    def on_entered(self, worker: Worker, world: EnterWorld) -> None:
        if world.rank in world.joiner_ranks or world.snapshot is not None:
            return
        here = self._met.setdefault(world.plan.generation, {})
        mine = here[worker.id] = dict(self._taken.get(worker.id, {}))
        for other, theirs in here.items():
            for step in mine.keys() & theirs.keys():
                (generation, _, partner), (other_generation, _, other_partner) = mine[step], theirs[step]
                if generation != other_generation or (partner == other) != (other_partner == worker.id and other != worker.id):
                    raise Violation(
                        f"step {step} is half applied: worker {worker.id} took it in generation {generation} with "
                        f"{partner or 'nobody'}, worker {other} in {other_generation} with {other_partner or 'nobody'}"
                    )
