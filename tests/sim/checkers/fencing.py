"""A world that was replaced commits nothing that the new one does not know of, but the one step that all had voted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic.domain import Plan, PlanKind
from elastic.protocol import MayVote
from tests.sim.clock import Clock, Violation
from tests.sim.worker import Gradient, Worker


class Fencing:
    """Votes and commits against the generations in the ledger."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.plans: dict[int, Plan] = {}
        self.goes_back: set[int] = set()  # generations that go on from a snapshot
        self.fences: dict[int, int] = {}  # committed FENCE or FOUND generations -> restore step

    def on_persisted(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "generation-opened":
            self.plans[data["plan"].generation] = data["plan"]
        elif kind == "generation-committed":
            plan = self.plans[data["generation"]]
            if plan.kind is not PlanKind.SWITCH:
                self.fences[plan.generation] = data["restore_step"]
                if data["snapshot_generation"]:
                    self.goes_back.add(plan.generation)

    def _newer(self, generation: int) -> list[int]:
        return [fence for fence in self.fences if fence > generation]

    def on_voted(self, worker: Worker, step: int, vote: MayVote) -> None:
        for fence in self._newer(vote.generation):
            if self.plans[fence].rank_of(worker.id) is not None:
                raise Violation(
                    f"worker {worker.id} votes on step {step} in generation {vote.generation}, but is a member of "
                    f"generation {fence}, which is committed"
                )

    def on_applied(self, worker: Worker, step: int, slots: tuple[Gradient, ...]) -> None:
        if worker.finishes_by_order:
            return
        assert worker.plan is not None
        for fence in self._newer(worker.plan.generation):
            if self.plans[fence].rank_of(worker.id) is not None:
                raise Violation(
                    f"worker {worker.id} commits step {step} in generation {worker.plan.generation}, but is a member of "
                    f"generation {fence}, which is committed"
                )
            if step > self.fences[fence] + 1 and fence not in self.goes_back:
                raise Violation(
                    f"worker {worker.id} commits step {step} in generation {worker.plan.generation}, which generation "
                    f"{fence} replaced after step {self.fences[fence]}"
                )
