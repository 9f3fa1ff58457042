"""All members enter a world after the same step, which is the ledger's, and nobody goes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic.domain import PlanKind
from elastic.protocol import EnterWorld
from tests.sim.clock import Violation
from tests.sim.worker import TORN, Worker


class Agreement:
    """The step after which each generation begins."""

    def __init__(self, *, hostile: bool, is_cut: bool) -> None:
        self.hostile = hostile
        self.is_cut = is_cut  # what each worker has is of use only together with all the others'
        self.begins_after: dict[int, int] = {}
        self.restores: dict[int, int] = {}
        self.kinds: dict[int, PlanKind] = {}
        self.last_restore = 0

    def on_persisted(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "generation-opened":
            self.kinds[data["plan"].generation] = data["plan"].kind
            if data["plan"].kind is PlanKind.FOUND:
                self.last_restore = 0
        if kind == "generation-committed":
            generation, restore = data["generation"], data["restore_step"]
            self.restores[generation] = restore
            if self.kinds[generation] is PlanKind.SWITCH:
                return  # begins wherever the verdict says
            if restore < self.last_restore and not data["snapshot_generation"]:
                raise Violation(
                    f"generation {generation} restores step {restore} after {self.last_restore} was agreed on"
                )
            self.last_restore = restore

    def on_entered(self, worker: Worker, world: EnterWorld) -> None:
        generation = world.plan.generation
        if generation not in self.restores:
            raise Violation(f"worker {worker.id} enters generation {generation}, which is not committed")
        if world.rank in world.joiner_ranks:
            goes_back = self.is_cut and world.snapshot is not None
            if worker.digest != TORN and worker.committed > self.restores[generation] and not goes_back:
                raise Violation(
                    f"worker {worker.id} has committed {worker.committed} and is given step {self.restores[generation]}"
                )
            return
        agreed = self.begins_after.setdefault(generation, world.committed)
        if world.committed != agreed:
            raise Violation(
                f"worker {worker.id} enters generation {generation} after step {world.committed}, others after {agreed}"
            )
        if world.plan.kind is not PlanKind.SWITCH and agreed != self.restores[generation]:
            raise Violation(
                f"worker {worker.id} enters generation {generation} after step {agreed}, the ledger says "
                f"{self.restores[generation]}"
            )

    def on_exited(self, worker: Worker, reason: str) -> None:
        # With lost and reordered commands a worker may end itself; that is safe. Otherwise it never has to.
        if not self.hostile:
            raise Violation(f"worker {worker.id} ended itself: {reason}")
