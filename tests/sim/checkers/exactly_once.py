"""Every committed step holds every slot once, computed with the right parameters, and is applied once on every replica."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic.digests import digest_of_layers
from tests.sim.clock import Violation
from tests.sim.scenario import CHECKPOINT_DIGEST, Scenario
from tests.sim.worker import Gradient, Worker


class ExactlyOnce:
    """Slots, sequence of steps and digests of all replicas against one chain."""

    def __init__(self, scenario: Scenario) -> None:
        self.chain: dict[int, int] = {0: scenario.initial_digest}
        if scenario.begins_after:
            self.chain[scenario.begins_after] = CHECKPOINT_DIGEST
        self.applied: dict[str, int] = {}
        self.scenario = scenario

    def on_reduced(self, worker: Worker, step: int, gradients: tuple[Gradient, ...]) -> None:
        assert worker.plan is not None
        slots = [slot for _, slot, _ in gradients]
        if slots != list(range(worker.plan.slots)):
            raise Violation(f"step {step} sums slots {slots}, but there are {worker.plan.slots}")
        wrong = [g for g in gradients if g[0] != step or g[2] != worker.digest]
        if wrong:
            raise Violation(
                f"step {step} of worker {worker.id} (digest {worker.digest}) sums gradients of another step or state: {wrong}"
            )

    def on_applied(self, worker: Worker, step: int, gradients: tuple[Gradient, ...]) -> None:
        before = self.applied.get(worker.id, 0)
        if step != before + 1:
            raise Violation(f"worker {worker.id} applies step {step} after step {before}")
        self.applied[worker.id] = step
        self._compare(worker, step)

    def on_persisted(self, kind: str, data: Mapping[str, Any]) -> None:
        """The digest of a pipeline is put together from all its layers."""
        if kind == "loop-ended" and self.scenario.spec.is_pipeline and not self.scenario.hostile:
            layers = [f"{self.chain[data['step']]:x}"] * len(self.scenario.spec.layers)
            if data["digest"] != digest_of_layers(layers):
                raise Violation(f"the job ends with digest {data['digest']!r}, which is not that of step {data['step']}")

    def on_received(self, worker: Worker) -> None:
        self.applied[worker.id] = worker.committed
        if worker.committed not in self.chain:
            raise Violation(f"worker {worker.id} was given step {worker.committed}, which nobody has committed")
        self._compare(worker, worker.committed)

    def _compare(self, worker: Worker, step: int) -> None:
        if self.chain.setdefault(step, worker.digest) != worker.digest:
            raise Violation(f"after step {step} worker {worker.id} holds {worker.digest}, others {self.chain[step]}")
