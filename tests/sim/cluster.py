"""One run: the site of a scenario, its faults, its checkers, and how long each of them is given."""

from __future__ import annotations

from dataclasses import dataclass

from tests.sim.checkers import make_checkers
from tests.sim.clock import Violation
from tests.sim.faults import Fault
from tests.sim.process import Process
from tests.sim.scenario import Scenario, make_scenario
from tests.sim.site import Site
from tests.sim.strikes import strike

PROGRESS_S = 160.0  # after the last fault the job must have come to its end by then
ENDING_S = 45.0  # and all processes this long after the job
HOSTILE_S = 30.0  # how long a cluster with garbled streams is watched


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    seed: int
    outcome: str
    reason: str
    events: int
    seconds: float
    faults: tuple[str, ...]


class Cluster(Site):
    """One run of one scenario."""

    def __init__(self, scenario: Scenario, *, verbose: bool = False) -> None:
        super().__init__(scenario, verbose=verbose)
        self.watchers = make_checkers(self)

    def strike(self, fault: Fault, process: Process | None) -> None:
        strike(self, fault, process)

    def run(self) -> Result:
        """Run to the end. Raises Violation at the first broken promise."""
        quiet_at = self.scenario.quiet_at_s
        self.clock.after(quiet_at, self.calm)
        if self.scenario.hostile:
            self.clock.run(HOSTILE_S, self.all_ended)
        else:
            self.clock.run(quiet_at + PROGRESS_S, self.is_over)
            if self.ended_at is None:
                raise Violation(f"the job has not ended {PROGRESS_S:.0f} s after the last fault")
            self.clock.run(max(quiet_at, self.ended_at) + ENDING_S, self.all_ended)
        self.observe("over")
        ended = [data for kind, data in self.ledger if kind == "job-ended"]
        outcome, reason = (ended[0]["outcome"], ended[0]["reason"]) if ended else ("watched", "")
        return Result(self.scenario.seed, outcome, reason, self.clock.events, self.clock.now, tuple(self.faults_struck))


class SeedFailed(AssertionError):
    """A seed broke a promise; the text holds the story and how to replay it."""


def run_seed(seed: int, *, verbose: bool = False, hostile: bool | None = None) -> Result:
    """Run one seed. Raises SeedFailed."""
    cluster = Cluster(make_scenario(seed, hostile=hostile), verbose=verbose)
    try:
        return cluster.run()
    except Exception as error:
        flag = " --hostile" if hostile else ""
        story = "\n".join(cluster.trace.lines())
        raise SeedFailed(
            f"{story}\n\nseed {seed} at {cluster.clock.now:.4f} s: {type(error).__name__}: {error}\n"
            f"faults: {', '.join(cluster.faults_struck) or 'none'}\n"
            f"replay: python -m tests.sim --seed {seed} --verbose{flag}"
        ) from error
