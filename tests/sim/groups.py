"""Process groups as torch.distributed would give them: built by all or by none, broken for everybody, each in its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from elastic.domain import Plan
from tests.sim.clock import Violation


class Builder(Protocol):
    """A worker as its groups see it."""

    id: str
    alive: bool

    def post(self, delay_s: float, call: Callable[..., None], *args: Any) -> None: ...

    def group_stands(self, generation: int) -> None: ...

    def group_fell(self, generation: int, reason: str) -> None: ...

    def operation_done(self, result: Any) -> None: ...


TRANSFER = "transfer"


@dataclass(frozen=True)
class Broken:
    """What an operation gives instead of a result."""

    reason: str


@dataclass
class Operation:
    """One collective: all members must ask for the same one.

    In a TRANSFER, the second part of `what` is the number of joiners; they bring None.
    """

    what: tuple[str, int]
    values: dict[str, Any] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)  # members that complete it unless the group breaks first


class Group:
    """The group of one generation.

    An operation completes at each member some time after all have contributed. As soon as one member dies or drops the
    group, every other notices, each in its own time, and its pending operation fails: some may have the result, others not.
    """

    def __init__(self, random: Random, plan: Plan, dead_links: set[frozenset[str]]) -> None:
        self.random = random
        self.plan = plan
        self.dead_links = dead_links
        self.nodes = {member.node for member in plan.members}
        self.members = plan.workers()
        self.building: dict[str, Builder] = {}
        self.standing: set[str] = set()
        self.gone: dict[str, str] = {}  # members that dropped it, died, or noticed that somebody did
        self.operations: list[Operation] = []
        self.done: dict[str, int] = {}
        self.pending: dict[str, Operation] = {}

    def begin(self, worker: Builder) -> None:
        """A member begins to build."""
        if worker.id in self.building:
            raise Violation(f"worker {worker.id} builds the group of generation {self.plan.generation} twice")
        self.building[worker.id] = worker
        worker.post(self.plan.prepare_timeout_ms / 1000, self._give_up, worker)
        if self.gone:
            worker.post(self.random.uniform(0.0, 0.2), self._notice, worker)
        else:
            self._connect()

    def _connect(self) -> None:
        if len(self.building) == len(self.members) and not self._is_parted():
            for member in self.building.values():
                member.post(self.random.uniform(0.002, 0.08), self._stand, member)

    def _is_parted(self) -> bool:
        """Whether a link between two of its nodes is dead: then nothing completes, and nobody notices anything."""
        return any(link <= self.nodes for link in self.dead_links)

    def mended(self) -> None:
        """A link carries again what was on its way."""
        if not self.gone and not self.standing:
            self._connect()
        for operation in self.operations:
            self._hand_out(operation)

    def _stand(self, worker: Builder) -> None:
        if worker.id not in self.gone and worker.id not in self.standing:
            self.standing.add(worker.id)
            worker.group_stands(self.plan.generation)

    def _give_up(self, worker: Builder) -> None:
        if worker.id not in self.gone and worker.id not in self.standing:
            self._fall(worker, "not all members came in time")

    def _fall(self, worker: Builder, reason: str) -> None:
        self.leave(worker, reason)
        worker.group_fell(self.plan.generation, reason)

    def leave(self, worker: Builder, reason: str, *, silent: bool = False) -> None:
        """A member drops the group or dies; `silent` when its machine vanished and nobody can notice."""
        if worker.id in self.gone or worker.id not in self.building:
            return
        self.gone[worker.id] = reason
        if worker.alive and worker.id in self.pending:
            worker.post(self.random.uniform(0.0, 0.005), self._fail, worker, reason)
        if silent:
            return
        for other in self.building.values():
            if other is not worker and other.id not in self.gone:
                other.post(self.random.uniform(0.0, 0.15), self._notice, other)

    def _notice(self, worker: Builder) -> None:
        if worker.id in self.gone:
            return
        if worker.id not in self.standing:
            if self.random.random() < 0.5:
                self._fall(worker, "a peer went away")
            return
        self.gone[worker.id] = "a peer went away"
        self._fail(worker, "a peer went away")

    def glitch(self) -> None:
        """The network between the members breaks although everybody lives."""
        for member in self.building.values():
            member.post(self.random.uniform(0.0, 0.15), self._notice, member)

    def contribute(self, worker: Builder, what: tuple[str, int], value: Any) -> None:
        """A member enters its next operation; `operation_done` is called on it with all values, or Broken."""
        if worker.id in self.gone or worker.id not in self.standing:
            reason = self.gone.get(worker.id, "it never stood here")
            worker.post(self.random.uniform(0.0, 0.01), worker.operation_done, Broken(reason))
            return
        index = self.done.get(worker.id, 0)
        self.done[worker.id] = index + 1
        if index == len(self.operations):
            self.operations.append(Operation(what))
        operation = self.operations[index]
        if operation.what != what:
            raise Violation(
                f"worker {worker.id} enters {what} in generation {self.plan.generation} where its peers are in {operation.what}"
            )
        operation.values[worker.id] = value
        self.pending[worker.id] = operation
        self._hand_out(operation)

    def _hand_out(self, operation: Operation) -> None:
        for member in self.building.values():
            if (
                member.id in operation.values
                and member.id not in operation.ready
                and self._may_complete(member, operation)
            ):
                operation.ready.add(member.id)
                member.post(self.random.uniform(0.001, 0.03), self._complete, member, operation)

    def _may_complete(self, member: Builder, operation: Operation) -> bool:
        """Whether all that this member waits for has come: everybody, or all who take where it only gives."""
        if self._is_parted():
            return False
        name, joiners = operation.what
        if name == TRANSFER and operation.values[member.id] is not None:
            return sum(value is None for value in operation.values.values()) == joiners
        return len(operation.values) == len(self.members)

    def _complete(self, worker: Builder, operation: Operation) -> None:
        if self.pending.get(worker.id) is operation:
            del self.pending[worker.id]
            worker.operation_done(operation.values)

    def _fail(self, worker: Builder, reason: str) -> None:
        if self.pending.pop(worker.id, None) is not None:
            worker.operation_done(Broken(reason))


class Groups:
    """All groups that ever were, by generation."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._by_generation: dict[int, Group] = {}
        self.dead_links: set[frozenset[str]] = set()

    def part(self, link: frozenset[str]) -> None:
        """Let a link between two nodes die."""
        self.dead_links.add(link)

    def mend(self, link: frozenset[str]) -> None:
        """Let it live again."""
        if link in self.dead_links:
            self.dead_links.remove(link)
            for group in self._by_generation.values():
                group.mended()

    def begin(self, worker: Builder, plan: Plan) -> None:
        group = self._by_generation.get(plan.generation)
        if group is None:
            group = self._by_generation[plan.generation] = Group(self._random, plan, self.dead_links)
        if group.plan != plan:
            raise Violation(f"two plans for generation {plan.generation}: {group.plan} and {plan}")
        group.begin(worker)

    def of(self, generation: int) -> Group | None:
        return self._by_generation.get(generation)

    def all(self) -> Mapping[int, Group]:
        return self._by_generation

    def worker_died(self, worker: Builder, *, silent: bool) -> None:
        for group in self._by_generation.values():
            group.leave(worker, "it died", silent=silent)
