"""The job ends for a reason that is true, and after it every process ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic.domain import PlanKind
from tests.sim.agent import Agent
from tests.sim.clock import Violation
from tests.sim.site import Site
from tests.sim.worker import Worker


class Endings:
    """The outcome against what is really there."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.loop_ended = False
        self.conclusions = 0
        self.stop_decided: set[int] = set()

    def on_concluded(self, worker: Worker) -> None:
        self.conclusions += 1
        if not self.loop_ended and not self.site.scenario.hostile:
            raise Violation(f"worker {worker.id} concludes before all have left the loop")

    def on_stop_decided(self, step: int) -> None:
        self.stop_decided.add(step)

    def _holders(self) -> list[Worker]:
        """Workers that live and hold a trained state, wherever they are; none of them does if it is cut."""
        if self.site.scenario.spec.holds_parts:
            return []
        return [
            w
            for w in self.site.workers
            if w.alive and w.committed > 0 and w.machine.has_state and not w.machine.finished
        ]

    def on_persisted(self, kind: str, data: Mapping[str, Any]) -> None:
        if self.site.scenario.hostile:
            return
        if kind == "generation-opened" and data["plan"].kind is PlanKind.FOUND and (held := self._known_holders()):
            raise Violation(
                f"the job is founded anew although {held[0].id} holds the state of step {held[0].committed}"
            )
        if kind == "loop-ended":
            self.loop_ended = True
        if kind == "job-ended":
            self._judge(data["outcome"], data["reason"])

    def _known_holders(self) -> list[Worker]:
        """Holders that are members of the newest committed world: whoever was left out does not count."""
        opened = {d["plan"].generation: d["plan"] for k, d in self.site.ledger if k == "generation-opened"}
        committed = [d["generation"] for k, d in self.site.ledger if k == "generation-committed"]
        if not committed:
            return []
        return [w for w in self._holders() if opened[committed[-1]].rank_of(w.id) is not None]

    def _judge(self, outcome: str, reason: str) -> None:
        scenario = self.site.scenario
        if outcome == "succeeded":
            without_session = scenario.never_prepares or "script ends early" in self.site.faults_struck
            if reason == "every worker's script ended" and without_session:
                return
            if scenario.concludes and not self.conclusions:
                raise Violation("succeeded although nobody has done what must be done once")
            last = {scenario.steps, *self.stop_decided}
            if reason not in {f"finished after step {step}" for step in last}:
                raise Violation(f"succeeded after none of the steps {sorted(last)}: {reason}")
            return
        if self.loop_ended and reason.startswith("no worker finished") and scenario.concludes:
            if any(w.alive and w.machine.left and not w.machine.finished for w in self.site.workers):
                raise Violation(f"{reason}; but a worker that could do it lives")
            return
        if self.loop_ended and outcome == "failed":
            raise Violation(f"failed although the loop had ended everywhere: {reason}")
        if outcome == "stopped":
            if "job stopped" not in self.site.faults_struck:
                raise Violation(f"stopped, but nobody asked for it: {reason}")
            return
        if reason.startswith("every copy of the training state was lost"):
            if held := self._known_holders():
                raise Violation(f"{reason}; but worker {held[0].id} lives and holds step {held[0].committed}")
            return
        if "cannot feed" in reason and 0 < scenario.spec.slots < scenario.settings.nodes_max * scenario.nproc:
            return
        if "cannot train with the others" in reason and scenario.late_spec:
            return
        if reason.startswith("--approximate-recovery: there are ") and scenario.settings.approximate:
            return  # so few workers were there that there are no three stages
        if reason.startswith("--skip-ratio 0.25: ") and scenario.settings.skip_ratio:
            return  # so few workers were there that nothing lies between the ends
        if reason.startswith("--swap-ends: a step has one slot only") and scenario.spec.slots == 1:
            return
        if "same exception" in reason and scenario.raises_times > 1:
            return
        if "--max-restarts" in reason and self._something_failed():
            return
        nodes = [n for n in self.site.nodes.values() if not n.abandoned]
        if ("--nnodes MIN" in reason or "no first world" in reason) and (
            len(nodes) < scenario.settings.nodes_min or self._something_failed()
        ):
            return
        raise Violation(f"failed for no good reason: {reason}")

    def _something_failed(self) -> bool:
        """Whether workers ended by a fault of their own, so that their places may be given up."""
        scenario = self.site.scenario
        own = (scenario.raises_times, scenario.quits_early, scenario.failed_forks, scenario.late_spec)
        return any(own) or any(kind in self.site.faults_struck for kind in ("worker killed", "script ends early"))

    def on_agent_ended(self, agent: Agent, code: int, reason: str) -> None:
        left = [w.id for w in agent.workers.values() if w.alive]
        if left:
            raise Violation(f"agent {agent.incarnation} ends, but its worker {left[0]} still runs")

    def on_over(self) -> None:
        if self.site.scenario.hostile:
            return
        agents = [a.incarnation for a in self.site.agents if a.alive]
        workers = [w.id for w in self.site.workers if w.alive]
        if agents or workers:
            raise Violation(f"the job has ended, but these still run: {', '.join(agents + workers)}")
