"""Whoever reduces a step together has it dealt for the same world: otherwise samples were used twice, or by nobody."""

from __future__ import annotations

from tests.sim.clock import Violation
from tests.sim.worker import Worker


class DealtAlike:
    """For which world each step was dealt that a world has reduced."""

    def __init__(self) -> None:
        self._dealt: dict[tuple[int, int], int] = {}  # generation that reduces, step -> generation that it is dealt for

    def on_reduced(self, worker: Worker, step: int, _: object) -> None:
        plan, dealt = worker.plan, worker.dealt
        assert plan is not None
        if dealt is None or dealt.step != step:
            raise Violation(f"worker {worker.id} reduces step {step}, and has {dealt}")
        agreed = self._dealt.setdefault((plan.generation, step), dealt.generation)
        if dealt.generation != agreed:
            raise Violation(
                f"worker {worker.id} reduces step {step} as dealt for generation {dealt.generation}, others for {agreed}"
            )
