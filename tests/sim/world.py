"""What every simulated process sees of the world: time, chance, the other ends of its streams, and who watches."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from elastic.snapshots import SnapshotId
from tests.sim.clock import Clock, Trace
from tests.sim.faults import Fault, Moment
from tests.sim.groups import Groups
from tests.sim.links import End, Stream
from tests.sim.memory import Memory
from tests.sim.process import Process
from tests.sim.scenario import CHECKPOINT_DIGEST, Scenario


class World:
    """The ground under all processes; it knows none of them."""

    def __init__(self, scenario: Scenario, *, verbose: bool = False) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.random = Random(f"run {scenario.seed}")
        self.trace = Trace(self.clock, verbose=verbose)
        self.note = self.trace.note
        self.groups = Groups(self.random)
        self.ledger: list[tuple[str, Any]] = []
        self.watchers: tuple[object, ...] = ()
        self.faults_struck: list[str] = []
        self.ended_at: float | None = None
        self.disk: dict[SnapshotId, int] = {}  # the durable tier: the digest of each checkpoint
        if scenario.begins_after:
            self.disk[SnapshotId(scenario.begins_after, 1)] = CHECKPOINT_DIGEST
        self._pid = 5000
        self._raised = 0
        self._quit = 0
        self._forks_failed = 0
        self._moments: dict[str, int] = {}
        self._awaited: dict[str, list[tuple[Moment, Fault]]] = {}
        self._hooks: dict[str, list[Callable[..., None]]] = {}
        for fault in scenario.faults:
            if isinstance(fault.when, Moment):
                self._awaited.setdefault(fault.when.what, []).append((fault.when, fault))
            else:
                self.clock.after(fault.when, self.strike, fault, None)

    # -- what the processes tell -----------------------------------------------------------------------------------

    def observe(self, hook: str, *args: Any) -> None:
        """Tell the checkers."""
        calls = self._hooks.get(hook)
        if calls is None:
            found = (getattr(watcher, f"on_{hook}", None) for watcher in self.watchers)
            calls = self._hooks[hook] = [call for call in found if call is not None]
        for call in calls:
            call(*args)
        if hook == "persisted" and args[0] == "job-ended":
            self.ended_at = self.clock.now

    def moment(self, what: str, process: Process | None) -> None:
        """Something happened that faults may be waiting for."""
        awaited = self._awaited.get(what)
        if awaited is None:
            return
        self._moments[what] = nth = self._moments.get(what, 0) + 1
        for moment, fault in awaited:
            if moment.nth == nth:
                self.clock.after(moment.delay_s, self.strike, fault, process)

    def is_over(self) -> bool:
        return self.ended_at is not None

    def is_quiet(self) -> bool:
        return self.clock.now >= self.scenario.quiet_at_s

    # -- what the processes ask for --------------------------------------------------------------------------------

    def connect(self, worker: End, agent: End) -> Stream:
        return Stream(self.clock, self.random, self.scenario.local, worker, agent)

    def connect_controller(self, agent: End, partitioned_until_s: float) -> Stream:
        raise NotImplementedError

    def memories(self, node: str) -> dict[str, Memory]:
        """What the agents hold of snapshots that a node reaches, by node."""
        raise NotImplementedError

    def controller_died(self) -> None:
        raise NotImplementedError

    def strike(self, fault: Fault, process: Process | None) -> None:
        raise NotImplementedError

    def next_pid(self) -> int:
        self._pid += 1
        return self._pid

    # -- what user code and the system do by themselves ------------------------------------------------------------

    def raises(self, step: int, slot: int) -> bool:
        if self.scenario.raises_at != (step, slot) or self._raised >= self.scenario.raises_times:
            return False
        self._raised += 1
        self.note("user code raises at step %d, slot %d", step, slot)
        return True

    def quits_early(self) -> bool:
        self._quit += 1
        return self._quit <= self.scenario.quits_early

    def fork_fails(self) -> bool:
        self._forks_failed += 1
        return self._forks_failed <= self.scenario.failed_forks
