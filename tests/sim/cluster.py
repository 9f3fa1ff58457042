"""A whole cluster: builds the processes of a scenario, lets its faults happen, runs it to its end, asks the checkers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from tests.sim.agent import Agent, Node
from tests.sim.checkers import make_checkers
from tests.sim.clock import Clock, Trace, Violation
from tests.sim.controller import Controller
from tests.sim.faults import Fault, Moment, strike
from tests.sim.groups import Groups
from tests.sim.links import End, Stream
from tests.sim.process import Process
from tests.sim.scenario import Scenario, make_scenario

if TYPE_CHECKING:
    from tests.sim.worker import Worker

PROGRESS_S = 160.0  # after the last fault the job must have come to its end by then
ENDING_S = 45.0  # and all processes this long after the job
HOSTILE_S = 30.0  # how long a cluster with garbled streams is watched


class _Nobody:
    """The other end of a connection to a process that is not there."""

    def run(self, call: Any, *args: Any) -> None:
        return

    def on_message(self, stream: Stream, message: Any) -> None:
        return

    def on_reset(self, stream: Stream, reason: str) -> None:
        return


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    seed: int
    outcome: str
    reason: str
    events: int
    seconds: float
    faults: tuple[str, ...]


class Cluster:
    """One run of one scenario."""

    def __init__(self, scenario: Scenario, *, verbose: bool = False) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.random = Random(f"run {scenario.seed}")
        self.trace = Trace(self.clock, verbose=verbose)
        self.note = self.trace.note
        self.groups = Groups(self.random)
        self.ledger: list[tuple[str, Any]] = []
        self.nodes: dict[str, Node] = {}
        self.agents: list[Agent] = []
        self.workers: list[Worker] = []
        self.faults_struck: list[str] = []
        self.ended_at: float | None = None
        self._pid = 5000
        self._raised = 0
        self._quit = 0
        self._forks_failed = 0
        self._moments: dict[str, int] = {}
        self._awaited: dict[str, list[tuple[Moment, Fault]]] = {}
        self.checkers = make_checkers(self)
        self._hooks: dict[str, list[Callable[..., None]]] = {}
        for fault in scenario.faults:
            if isinstance(fault.when, Moment):
                self._awaited.setdefault(fault.when.what, []).append((fault.when, fault))
            else:
                self.clock.after(fault.when, strike, self, fault, None)
        self.controller = Controller(self, self.ledger)
        for _ in range(scenario.nodes):
            self.add_node()

    # -- building --------------------------------------------------------------------------------------------------

    def add_node(self) -> None:
        node = Node(self, f"n{len(self.nodes)}")
        self.nodes[node.name] = node
        self.clock.after(self.random.uniform(0.0, 0.3), node.start_agent)

    def connect(self, worker: Worker, agent: Agent) -> Stream:
        return Stream(self.clock, self.random, self.scenario.local, worker, agent)

    def connect_controller(self, agent: Agent) -> Stream:
        reachable = self.controller.alive
        other: End = self.controller if reachable else _Nobody()
        stream = Stream(self.clock, self.random, self.scenario.network, agent, other)
        if not reachable:
            stream.silence(0.02)
        elif agent.node.partitioned_until > self.clock.now:
            stream.hold(agent.node.partitioned_until)
        return stream

    def partition(self, node: Node, seconds: float) -> None:
        """Cut a node off from the controller: TCP delivers late what it does not give up."""
        until = self.clock.now + seconds
        node.partitioned_until = max(node.partitioned_until, until)
        if node.agent is not None and node.agent.stream is not None:
            node.agent.stream.hold(until)

    def next_pid(self) -> int:
        self._pid += 1
        return self._pid

    # -- what the processes tell -----------------------------------------------------------------------------------

    def observe(self, hook: str, *args: Any) -> None:
        """Tell the checkers."""
        calls = self._hooks.get(hook)
        if calls is None:
            found = (getattr(checker, f"on_{hook}", None) for checker in self.checkers)
            calls = self._hooks[hook] = [call for call in found if call is not None]
        for call in calls:
            call(*args)
        if hook == "persisted" and args[0] == "job-ended":
            self.ended_at = self.clock.now

    def moment(self, what: str, worker: Worker | None) -> None:
        """Something happened that faults may be waiting for."""
        awaited = self._awaited.get(what)
        if awaited is None:
            return
        self._moments[what] = nth = self._moments.get(what, 0) + 1
        for moment, fault in awaited:
            if moment.nth == nth:
                self.clock.after(moment.delay_s, strike, self, fault, worker)

    def controller_died(self) -> None:
        seconds = self.random.choice((0.1, 0.5, 2.0, 5.0)) if self.random.random() < 0.97 else 30.0
        self.clock.after(seconds, self._start_controller)

    def _start_controller(self) -> None:
        if not self.is_over():  # the daemon refuses the ledger of a job that has ended
            self.note("controller starts on its ledger of %d records", len(self.ledger))
            self.controller = Controller(self, self.ledger)

    # -- what user code and the system do by themselves ------------------------------------------------------------

    def raises(self, worker: Worker, step: int, slot: int) -> bool:
        if self.scenario.raises_at != (step, slot) or self._raised >= self.scenario.raises_times:
            return False
        self._raised += 1
        self.note("user code raises in worker %s at step %d, slot %d", worker.id, step, slot)
        return True

    def quits_early(self) -> bool:
        self._quit += 1
        return self._quit <= self.scenario.quits_early

    def fork_fails(self) -> bool:
        self._forks_failed += 1
        return self._forks_failed <= self.scenario.failed_forks

    # -- running ---------------------------------------------------------------------------------------------------

    def is_over(self) -> bool:
        return self.ended_at is not None

    def is_quiet(self) -> bool:
        return self.clock.now >= self.scenario.quiet_at_s

    def _calm(self) -> None:
        processes: list[Process] = [self.controller, *self.agents, *self.workers]
        for process in processes:
            process.dies_after_effects = None
            process.go_on()
        self.note("QUIET: from here on nothing goes wrong")

    def _all_ended(self) -> bool:
        return (
            self.ended_at is not None
            and not any(agent.alive for agent in self.agents)
            and not any(worker.alive for worker in self.workers)
        )

    def run(self) -> Result:
        """Run to the end. Raises Violation at the first broken promise."""
        quiet_at = self.scenario.quiet_at_s
        self.clock.after(quiet_at, self._calm)
        if self.scenario.hostile:
            self.clock.run(HOSTILE_S, self._all_ended)
        else:
            self.clock.run(quiet_at + PROGRESS_S, self.is_over)
            if self.ended_at is None:
                raise Violation(f"the job has not ended {PROGRESS_S:.0f} s after the last fault")
            self.clock.run(max(quiet_at, self.ended_at) + ENDING_S, self._all_ended)
        self.observe("over")
        ended = [data for kind, data in self.ledger if kind == "job-ended"]
        outcome, reason = (ended[0]["outcome"], ended[0]["reason"]) if ended else ("watched", "")
        return Result(
            self.scenario.seed, outcome, reason, self.clock.events, self.clock.now, tuple(self.faults_struck)
        )


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
