"""A worker process around the real `WorkerMachine`: control thread, group builders, and the main thread as a coroutine.

The main thread does what the session does: register, warm up, then slots, reduce, vote, verdict, commit, in the same order
and with the same questions in between. Tensors are replaced by what they depend on: a slot's gradient is (step, slot,
digest of the parameters), and the parameters are a hash chain over what was added to them.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from elastic.digests import joined_digests
from elastic.domain import Failed, LayerMove, Plan, PlanKind, StartWorker
from elastic.pipeline.moves import fill, handovers
from elastic.protocol import (
    Answer,
    Applied,
    AskCommit,
    AskVote,
    AskWorld,
    BuildGroup,
    CollectiveBroke,
    Dealt,
    DropGroup,
    EnterWorld,
    Event,
    Exit,
    Finished,
    FinishStep,
    GoOn,
    GroupFell,
    GroupStands,
    HandOver,
    HasConcluded,
    Heard,
    LoopEnded,
    MayCommit,
    MayVote,
    MustConclude,
    Register,
    Send,
    StateReceived,
    StateSpoilt,
    UserCodeRaised,
    Wait,
    WakeMain,
    Warmed,
    WorkerMachine,
)
from elastic.snapshots import Ballot, SnapshotId
from elastic.snapshotter import Snapshotter
from tests.sim.clock import Violation
from tests.sim.groups import TRANSFER, Broken
from tests.sim.links import End, Stream
from tests.sim.memory import Capturer, Memory
from tests.sim.process import Process
from tests.sim.world import World

TORN = -1  # digest of parameters that are partly overwritten
FENCED_EXIT_CODE = 70


@dataclass(frozen=True, slots=True)
class Sleep:
    """The main thread computes."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WaitForWake:
    """The main thread waits for WakeMain, unless one has come since `seen`."""

    seen: int


@dataclass(frozen=True, slots=True)
class Collective:
    """The main thread enters an operation of the adopted world, or of `generation`, and waits for all values, or Broken."""

    what: tuple[str, int]
    value: Any
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker alone holds of the optimizer's state: part `index` of `count`, of the state with this digest."""

    index: int
    count: int
    digest: int


Request = Sleep | WaitForWake | Collective
Main = Generator[Request, Any, Any]
Gradient = tuple[int, int, int]  # step, slot, digest of the parameters it was computed with


class Parent(End, Protocol):
    """The agent that forked a worker."""

    memory: Memory

    def worker_ended(self, worker: Worker, code: int) -> None: ...

    def captured(self, plan: Plan, snapshot: SnapshotId) -> None: ...


class Worker(Process):
    """One worker process."""

    def __init__(self, world: World, parent: Parent, order: StartWorker, pid: int) -> None:
        super().__init__(world.clock)
        self.world = world
        self.parent = parent
        self.id = order.worker
        self.local_rank = order.local_rank
        self.restarted = not self.id.endswith(".1")
        self.pid = pid
        self.random = world.random
        self.speed = world.scenario.worker_speed(self.random)
        self.machine = WorkerMachine(self.id)
        self.stream: Stream = world.connect(self, parent)
        self.page_generation = 0
        self.page_committed = 0
        self.page_progress = 0
        self.page_waits = False
        # What the engine holds.
        self.plan: Plan | None = None
        self.rank = 0
        self.committed = 0
        self.digest = world.scenario.initial_digest
        self.slots_done: dict[int, Gradient] = {}
        self.reduced: tuple[Gradient, ...] | None = None
        self.donate: tuple[int, ...] = ()
        self.snapshot: SnapshotId | None = None  # that all read the state from
        self.part: Part | None = None  # of a state that is cut; None before the first step
        self.dealt: Dealt | None = None  # for which world the next step is dealt, as in `elastic/sync/dealer.py`
        self.kept_deal = 0
        self.settles = False  # parts are still to be moved in the world that was entered
        self.has_left = False  # the loop
        self.follows = self.takes = False  # what optimizers need comes behind the layers; some of it comes here
        # Of a pipeline: the layers that are held, and of which state; every worker is born with all of them.
        self.layers: dict[int, int] = dict.fromkeys(range(len(world.scenario.spec.layers)), self.digest)
        self.moves: tuple[LayerMove, ...] = ()
        self.is_recut = False
        self.capturer = Capturer(parent.memory, self.id, world.scenario.buffers, self.random)
        self.snapshotter = Snapshotter()
        self.finishes_by_order = False  # what it writes was decided by a newer generation
        self._wakes = 0
        self._asleep = False
        self._main = self._run_main()
        self.post(self.speed.start_s, self._resume, None)

    # -- the process -----------------------------------------------------------------------------------------------

    def die(self, code: int, *, silent: bool = False) -> None:
        """End, for whatever reason; `silent` when its whole machine lost power."""
        if not self.alive:
            return
        self.world.note("worker %s ends with code %d", self.id, code)
        self.alive = False
        if silent:
            self.stream.vanish(self)
        else:
            self.stream.die(self)
        self.world.groups.worker_died(self, silent=silent)
        self.parent.worker_ended(self, code)

    def die_between_effects(self) -> None:
        self.world.note("worker %s is killed between two effects", self.id)
        self.die(-9)

    # -- the control thread and the builders -----------------------------------------------------------------------

    def on_message(self, stream: Stream, message: Any) -> None:
        self.world.note("worker %s hears %s", self.id, message)
        self.feed(Heard(message))

    def on_reset(self, stream: Stream, reason: str) -> None:
        if not self.machine.finished:
            self.die(FENCED_EXIT_CODE)

    def group_stands(self, generation: int) -> None:
        self.feed(GroupStands(generation))

    def group_fell(self, generation: int, reason: str) -> None:
        self.feed(GroupFell(generation, reason))

    def feed(self, event: Event) -> Answer | None:
        """Give the machine an event, perform its effects one by one, return its answer. Raises Died."""
        answer: Answer | None = None
        for effect in self.machine.step(event):
            self.spend_effect()
            match effect:
                case Send(message):
                    self.world.note("worker %s says %s", self.id, message)
                    self.stream.send(self, message)
                    self.world.observe("said", self, message)
                    self.world.moment(f"said:{type(message).__name__}", self)
                case BuildGroup(plan):
                    self.world.groups.begin(self, plan)
                case DropGroup(generation):
                    group = self.world.groups.of(generation)
                    if group is not None:
                        group.leave(self, f"generation {generation} was dropped")
                case WakeMain():
                    self._wakes += 1
                    if self._asleep:
                        self._asleep = False
                        self.post(self.random.uniform(0.0, 0.002), self._resume, None)
                case Exit(reason):
                    self.world.note("worker %s: Exit: %s", self.id, reason)
                    self.world.observe("exited", self, reason)
                    self.die(FENCED_EXIT_CODE)
                    self.spend_effect()
                case _:
                    answer = effect
        return answer

    def ask(self, event: Event) -> Answer:
        answer = self.feed(event)
        if answer is None:
            raise Violation(f"worker {self.id}: {event} was not answered")
        return answer

    # -- the main thread -------------------------------------------------------------------------------------------

    def _resume(self, value: Any) -> None:
        try:
            request = self._main.send(value)
        except StopIteration as end:
            self.die(end.value)
            return
        self.page_progress += 1
        self.page_waits = not isinstance(request, Sleep)
        match request:
            case Sleep(seconds):
                self.post(seconds, self._resume, None)
            case WaitForWake(seen):
                if self._wakes != seen:
                    self.post(0.0, self._resume, None)
                else:
                    self._asleep = True
            case Collective(what, value, generation):
                assert self.plan is not None
                group = self.world.groups.of(generation or self.plan.generation)
                assert group is not None
                group.contribute(self, what, value)

    def operation_done(self, result: Any) -> None:
        self._resume(result)

    def _run_main(self) -> Main:
        scenario = self.world.scenario
        if scenario.never_prepares:
            return 0
        if self.world.quits_early():
            return 3
        self.feed(Register(scenario.late_spec or scenario.spec if self.restarted else scenario.spec))
        while self.machine.admitted is None:
            yield WaitForWake(self._wakes)
        self.snapshotter = Snapshotter(self.capturer, self.machine.admitted.snapshot_every)
        if self.machine.admitted.joins_running_world:
            self.digest = TORN  # the throwaway slot writes to the parameters too
            yield Sleep(self.speed.slot_s)
            self.feed(Warmed())
        while True:
            if self._is_over() and self.plan is not None and self.plan.stages and self.machine.must_switch:
                break  # nothing moves any more
            if (yield from self._settle()):
                return 0
            if self._is_over():
                break
            self._capture()
            remaining = self._remaining()
            if remaining:
                yield Sleep(self.speed.slot_s * self.random.uniform(0.8, 1.2))
                if self.world.raises(self.committed + 1, remaining[0]):
                    error = scenario.user_error
                    self.feed(UserCodeRaised(Failed(self.committed + 1, remaining[0], error, "traceback")))
                    yield Sleep(0.001)
                    return 1
                self.slots_done[remaining[0]] = (self.committed + 1, remaining[0], self.digest)
            if not self._remaining() and (yield from self._commit_step()):
                return 0
        if self.is_recut and not (yield from self._settle_layers(False)):
            return FENCED_EXIT_CODE
        self.has_left = True
        self.world.moment("left the loop", self)
        self.feed(LoopEnded(self._final_digest(), self.committed, scenario.concludes))
        while True:
            answer = yield from self._ask_until(Wait, GoOn)
            match answer:
                case Finished():
                    return 0
                case MustConclude():
                    self.world.moment("concluding", self)
                    yield Sleep(self.random.uniform(0.0, 0.05))
                    self.world.observe("concluded", self)
                    self.feed(HasConcluded())
                case EnterWorld(snapshot=None):
                    yield from self._enter(answer)  # a loop that has ended gives the state to nobody
                    if self.is_recut:
                        if not (yield from self._settle_layers(False)):
                            return FENCED_EXIT_CODE
                        self.feed(LoopEnded(self._final_digest(), self.committed, scenario.concludes))
                case EnterWorld(snapshot=snapshot) if snapshot is not None and snapshot.step == self.committed:
                    yield from self._enter(answer)
                    yield from self._restore(snapshot)
                    self.feed(LoopEnded(self._final_digest(), self.committed, scenario.concludes))
                case EnterWorld():
                    return FENCED_EXIT_CODE  # it cannot go back
                case HandOver(plan):
                    yield from self._hand_over(plan)
                case _:
                    raise Violation(f"worker {self.id}: {answer} after the training loop")

    def _is_over(self) -> bool:
        return self.committed >= self.world.scenario.steps or self.machine.stopping

    def _capture(self) -> None:
        assert self.plan is not None
        self.capturer.digest = self.digest
        self.snapshotter.step_ended(self.committed, self.plan.generation, self.clock.now)
        self.parent.captured(self.plan, SnapshotId(self.committed, self.plan.generation))
        self.world.moment("captured", self)

    def _ask_until(self, *unsettled: type) -> Generator[Request, Any, Answer]:
        while True:
            seen = self._wakes
            answer = self.ask(AskWorld())
            if not isinstance(answer, unsettled):
                return answer
            yield WaitForWake(seen)

    def _remaining(self) -> list[int]:
        assert self.plan is not None
        return [s for s, owner in enumerate(self.plan.owners) if owner == self.rank and s not in self.slots_done]

    def _settle(self) -> Generator[Request, Any, bool]:
        """At a fetch: wait out a regroup, enter a new world, pass the state on. True when nothing is left to do."""
        while True:
            if (yield from self._regroup()) is None:
                return True
            if self.rank not in self.donate and self._is_over():
                return False
            joins = self.rank in self.donate
            if self.donate and not (yield from self._pass_state()):
                continue
            if not self.settles:
                return False
            assert self.plan is not None
            settle = self._settle_layers if self.plan.stages else self._settle_parts
            if (yield from settle(joins)):
                return False

    def _regroup(self) -> Generator[Request, Any, bool | None]:
        """Until the adopted world stands. Whether the step was committed on the way; None when all is finished."""
        committed = False
        while True:
            answer = yield from self._ask_until(Wait)
            match answer:
                case FinishStep(step):
                    self.finishes_by_order = True
                    yield from self._apply(step)
                    self.finishes_by_order = False
                    committed = True
                case EnterWorld():
                    yield from self._enter(answer)
                    yield Sleep(self._moment_s())
                    if not self.machine.broken:
                        return committed
                case HandOver(plan):
                    yield from self._hand_over(plan)
                case GoOn():
                    return committed
                case Finished():
                    return None
                case _:
                    raise Violation(f"worker {self.id}: {answer} while regrouping")

    def _enter(self, world: EnterWorld) -> Main:
        before = self.plan
        self.plan, self.rank, self.donate = world.plan, world.rank, world.joiner_ranks
        self.snapshot = world.snapshot
        self.snapshotter.expect(world.restores_per_s)
        self.page_generation = world.plan.generation
        if self.rank not in self.donate and world.committed != self.committed:
            raise Violation(f"worker {self.id} has committed {self.committed}, its machine says {world.committed}")
        self.world.observe("entered", self, world)
        self.world.moment("entered", self)
        self.kept_deal = world.kept_deal
        self._deal()
        if self.world.scenario.spec.shard_optimizer:
            yield from self._take_part(world, before)
        elif world.plan.stages:
            yield from self._take_layers(world, before)

    def _deal(self) -> None:
        """Deal the next step for the present world, unless it is dealt already and stays so."""
        plan = self.plan
        assert plan is not None
        if self.world.scenario.spec.holds_parts or not self.machine.has_state:
            return
        step, dealt = self.committed + 1, self.dealt
        is_old = dealt is not None and dealt.step == step
        stays = dealt is not None and (
            dealt.generation == plan.generation or (plan.kind is PlanKind.FENCE and dealt.generation == self.kept_deal)
        )
        if not (is_old and stays):
            self.dealt = Dealt(step, plan.generation)
            self.slots_done = {} if is_old else self.slots_done
        assert self.dealt is not None
        self.world.moment("dealing", self)
        self.feed(self.dealt)

    # -- a pipeline, as in `elastic/pipeline/engine.py` ------------------------------------------------------------

    def _take_layers(self, world: EnterWorld, before: Plan | None) -> Main:
        plan = world.plan
        self.slots_done = {}  # what is in flight belongs to several workers
        self.moves, self.is_recut, self.settles, self.follows = (), False, False, False
        if self.has_left and world.snapshot is None and not plan.is_recut:
            return
        if plan.is_recut:
            self.layers = {} if self.rank in self.donate else self.layers
            self.moves, self.is_recut, self.settles = plan.moves, True, True
            return
        if plan.kind is PlanKind.FOUND and world.snapshot is None:
            self.layers = dict.fromkeys(range(len(self.world.scenario.spec.layers)), self.world.scenario.initial_digest)
        elif world.snapshot is not None or self.rank in self.donate:
            self.layers = {}
        elif before is not None and plan.kind is PlanKind.SWITCH:
            yield from self._hand_layers_over(before, plan)
        if plan.kind is PlanKind.SWITCH:
            self.moves = plan.moves
        elif plan.kind is PlanKind.FENCE and world.snapshot is None:
            self.moves = fill(plan, world.joiner_ranks)
        self.settles = bool(self.moves)
        if not self.settles:
            self._keep_own_layers()

    def _hand_layers_over(self, before: Plan, plan: Plan) -> Main:
        moves = handovers(before, plan)
        if not moves:
            return
        held = yield Collective(("hand over", plan.generation), dict(self.layers), before.generation)
        if isinstance(held, Broken):
            self.layers, self.digest = {}, TORN
            if plan.rank_of(self.id) is not None:
                self.feed(StateSpoilt("the old world is gone"))
            return
        self._take_moved(moves, held, before)

    def _take_moved(self, moves: tuple[LayerMove, ...], held: dict[str, dict[int, int]], plan: Plan) -> bool:
        """Take the layers that go here among the members of a plan; whether there were any."""
        took, rank = False, plan.rank_of(self.id)
        for move in moves:
            for layer in range(move.first, move.last):
                given = {held[plan.members[source].worker].get(layer) for source in move.sources}
                if len(given) != 1 or None in given:
                    raise Violation(f"layer {layer} is given as {given} by {move.sources}")
                if rank in move.targets:
                    self.layers[layer] = given.pop() or 0
                    took = True
        return took

    def _settle_layers(self, joins: bool) -> Generator[Request, Any, bool]:
        assert self.plan is not None
        moves, self.moves, self.settles = self.moves, (), False
        self.world.moment("transfer", self)
        held = yield Collective(("settle", self.plan.generation), dict(self.layers))
        if isinstance(held, Broken):
            if any(self.rank in move.targets for move in moves):
                self.layers, self.digest = {}, TORN
            self.feed(CollectiveBroke(held.reason))
            return False
        took = self._take_moved(moves, held, self.plan)
        blends, self.is_recut = self.plan.blends if self.is_recut else (), False
        for blend in blends:
            if {layers.get(source) for source in blend.sources for layers in held.values()} - {None} != {self.digest}:
                raise Violation(f"layer {blend.layer} is made from {blend.sources}, and held is {held}")
            if blend.layer in self.plan.held_by(self.rank):
                self.layers[blend.layer] = self.digest
                took = True
        self._keep_own_layers()
        if self.plan.kind is PlanKind.SWITCH:
            self.follows, self.takes = True, took and not joins
        elif took and not joins:
            self.feed(StateReceived(self.committed))
        return True

    def _await_state(self) -> Generator[Request, Any, Broken | None]:
        """Before the first vote: what the optimizers need has followed the layers."""
        assert self.plan is not None
        if not self.follows:
            return None
        self.world.moment("transfer", self)
        held = yield Collective(("follow", self.plan.generation), None)
        if isinstance(held, Broken):
            return held
        self.follows = False
        if self.takes:
            self.feed(StateReceived(self.committed))
        return None

    def _keep_own_layers(self) -> None:
        assert self.plan is not None
        own = self.plan.held_by(self.rank)
        self.layers = {layer: state for layer, state in self.layers.items() if layer in own}

    def compute_s(self) -> float:
        """What a step of a pipeline takes this worker; one in three is slow, so that layers move away from it."""
        if self.plan is None or not self.plan.stages or self.plan.rank_of(self.id) is None:
            return 0.0
        layers = self.world.scenario.spec.layers
        each = sum(layers[layer].forward_s + layers[layer].backward_s for layer in self.plan.layers_of(self.rank))
        slots = sum(self.rank in self.plan.route(slot) for slot in range(self.plan.slots))
        return each * slots * (3.0 if zlib.crc32(self.id.encode()) % 3 == 0 else 1.0)

    def _check_layers(self) -> None:
        """Before a step: exactly the layers of the own stage, in the state that all are in."""
        if self.plan is not None and self.plan.stages:
            own = dict.fromkeys(self.plan.held_by(self.rank), self.digest)
            if self.layers != own:
                raise Violation(f"worker {self.id} trains with {self.layers}, and should hold {own}")

    def _final_digest(self) -> str:
        if self.plan is None or not self.plan.stages:
            return f"{self.digest:x}"
        return joined_digests({layer: f"{self.layers[layer]:x}" for layer in self.plan.layers_of(self.rank)})

    # -- a state that is cut, as in `elastic/zero.py` --------------------------------------------------------------

    def _take_part(self, world: EnterWorld, before: Plan | None) -> Main:
        size = world.plan.world_size
        staying = tuple(rank for rank in range(size) if rank not in world.joiner_ranks)
        self.settles = world.snapshot is None and len(staying) < size
        if world.snapshot is not None or self.rank in self.donate:
            self.part = None
        elif self.part is not None and before is not None and world.plan.kind is PlanKind.SWITCH:
            yield from self._move_to_those_who_stay(before, world.plan)
            if self.part is None:
                self.feed(StateSpoilt("the old world is gone"))

    def _hand_over(self, plan: Plan) -> Main:
        assert self.plan is not None
        if self.plan.stages:
            if not self.has_left:
                yield from self._hand_layers_over(self.plan, plan)
        elif self.part is not None:
            yield from self._move_to_those_who_stay(self.plan, plan)

    def _move_to_those_who_stay(self, before: Plan, plan: Plan) -> Main:
        ranks = [rank for member in plan.members if (rank := before.rank_of(member.worker)) is not None]
        if ranks == list(range(before.world_size)):
            return
        parts = yield Collective(("hand over", plan.generation), self.part, before.generation)
        mine = ranks.index(rank) if (rank := before.rank_of(self.id)) in ranks else None
        self._take(parts, before.world_size, mine, len(ranks))

    def _settle_parts(self, joins: bool) -> Generator[Request, Any, bool]:
        assert self.plan is not None
        parts = yield Collective(("settle", self.plan.generation), self.part)
        self.settles = False
        if isinstance(parts, Broken):
            self.part = None
            if self.committed:  # before the first step no optimizer has anything
                self.digest = TORN
            self.feed(CollectiveBroke(parts.reason))
            return False
        if self.committed and any(part is not None for part in parts.values()):
            given = [part for part in parts.values() if part is not None]
            self._take(parts, given[0].count, self.rank, self.plan.world_size)
        return True

    def _take(self, parts: Any, count: int, index: int | None, of: int) -> None:
        """Take part `index` of `of` of what all the old parts make up."""
        self.part = None
        if isinstance(parts, Broken):
            self.digest = TORN
            return
        given = {part for part in parts.values() if part is not None}
        if {part.index for part in given} != set(range(count)) or {(part.count, part.digest) for part in given} != {
            (count, self.digest)
        }:
            raise Violation(f"worker {self.id} holds {self.digest} and is given the parts {given} of {count}")
        if index is not None:
            self.part = Part(index, of, self.digest)

    def _gather(self, step: int) -> Generator[Request, Any, bool]:
        """Update the own part and get the others'; whether that came about."""
        assert self.plan is not None
        held, part = (self.rank, self.plan.world_size), self.part
        if part is not None and (part.index, part.count) != held:
            raise Violation(f"worker {self.id} updates part {held}, and holds {part}")
        values = yield Collective(("gather", step), None)
        if isinstance(values, Broken):
            self.part, self.digest = None, TORN
            self.feed(StateSpoilt(values.reason))
            return False
        return True

    def _pass_state(self) -> Generator[Request, Any, bool]:
        """Whether every joiner has the state now; False when the world broke first."""
        if not self.donate:
            return True
        joins = self.rank in self.donate
        if joins:
            self.digest = TORN
        self.world.moment("transfer", self)
        if self.snapshot is not None:
            yield from self._restore(self.snapshot)
            return True
        values = yield Collective((TRANSFER, len(self.donate)), None if joins else (self.committed, self.digest, self.dealt))
        if isinstance(values, Broken):
            self.feed(CollectiveBroke(values.reason))
            return False
        self.donate = ()
        if joins:
            given = {value for value in values.values() if value is not None}
            if len(given) != 1:
                raise Violation(f"joiner {self.id} is given different states: {given}")
            self.committed, self.digest, self.dealt = given.pop()
            self.slots_done, self.reduced = {}, None
            self.page_committed = self.committed
        if self.settles and self.plan is not None and self.plan.stages and not (yield from self._settle_layers(joins)):
            return False
        if joins:
            self.world.observe("received", self)
            self.feed(StateReceived(self.committed))
            self._deal()
        return True

    def _restore(self, snapshot: SnapshotId) -> Generator[Request, Any, None]:
        yield Sleep(self.random.uniform(0.001, 0.05))
        shots = self.parent.memory.readable.get(snapshot)
        if shots is None:
            raise Violation(f"worker {self.id} is to restore {snapshot}, which its agent has not assembled")
        assert self.plan is not None
        self.donate, self.snapshot = (), None
        self.committed = self.page_committed = snapshot.step
        self.digest = shots[0].digest
        if self.world.scenario.spec.shard_optimizer:
            self.part = Part(self.rank, self.plan.world_size, self.digest)
        if self.plan.stages:
            self.layers = dict.fromkeys(self.plan.held_by(self.rank), self.digest)
        self.slots_done, self.reduced = {}, None
        self.snapshotter.restored(snapshot.step)
        self.world.observe("received", self)
        self.world.moment("restored", self)
        self.feed(StateReceived(self.committed))
        self.dealt = None
        self._deal()

    def _commit_step(self) -> Generator[Request, Any, bool]:
        """Inside optimizer.step(). Returns without a commit if the regrouped world gives more slots; True when finished."""
        while True:
            outcome = yield from self._try_commit()
            if outcome == "committed":
                return False
            if isinstance(outcome, Broken):
                self.feed(CollectiveBroke(outcome.reason))
            committed = yield from self._regroup()
            if committed is None:
                return True
            if committed or self.donate or self.settles or self._remaining():
                return False

    def _try_commit(self) -> Generator[Request, Any, str | Broken]:
        assert self.plan is not None
        scenario = self.world.scenario
        step, generation = self.committed + 1, self.plan.generation
        self._check_layers()
        if (broken := (yield from self._await_state())) is not None:
            return broken
        mine = tuple(self.slots_done[s] for s, owner in enumerate(self.plan.owners) if owner == self.rank)
        values = yield Collective(("reduce", step), mine)
        if isinstance(values, Broken):
            return values
        self.reduced = tuple(sorted(gradient for part in values.values() for gradient in part))
        self.world.observe("reduced", self, step, self.reduced)
        self.world.moment("reduced", self)
        yield Sleep(self._moment_s())
        answer = self.ask(AskVote(step))
        if not isinstance(answer, MayVote):
            return "sealed"
        self.world.observe("voted", self, step, answer)
        self.world.moment("voted", self)
        stop = self.rank == 0 and 0 < scenario.stops_at <= step
        snapshots = self.snapshotter.vote(step, self.plan, self.clock.now)
        votes = yield Collective(("verdict", step), (step, answer.generation, answer.next_generation, stop, snapshots))
        if isinstance(votes, Broken):
            return votes
        if len({vote[:2] for vote in votes.values()}) != 1:
            raise Violation(f"generation {generation}, step {step}: votes differ: {votes}")
        yield Sleep(self._moment_s())
        following = min(newest for _, _, newest, _, _ in votes.values())
        stops = any(asked for *_, asked, _ in votes.values())
        ballots = [ballot for *_, ballot in votes.values()]
        verdict = Ballot(
            protected=min(ballot.protected for ballot in ballots),
            captures=all(ballot.captures for ballot in ballots),
            missed=any(ballot.missed for ballot in ballots),
            stable=max(ballot.stable for ballot in ballots),
        )
        if stops:
            self.world.observe("stop_decided", step)
        answer = self.ask(AskCommit(step, following, stops))
        if not isinstance(answer, MayCommit):
            return "sealed"
        plan = self.plan
        if isinstance(broken := (yield from self._apply(step)), Broken):
            return broken
        self.snapshotter.decided(step, plan, self.rank, verdict)
        return "committed"

    def _moment_s(self) -> float:
        """What passes between an operation and the question that follows: enough for the other thread to come first."""
        return self.random.uniform(0.0, 0.004) if self.random.random() < 0.9 else self.random.uniform(0.0, 0.1)

    def _apply(self, step: int) -> Generator[Request, Any, Broken | None]:
        assert self.plan is not None and self.reduced is not None
        self.world.moment("applying", self)
        before, self.digest = self.digest, TORN
        yield Sleep(self.speed.apply_s)
        slots = self.reduced
        is_cut = self.world.scenario.spec.shard_optimizer
        if is_cut and not (yield from self._gather(step)):
            return Broken("the update was not gathered")
        self.digest = abs(hash((before, step, slots)))
        if is_cut:
            self.part = Part(self.rank, self.plan.world_size, self.digest)
        self.layers = dict.fromkeys(self.layers, self.digest)
        self.committed = self.page_committed = step
        self.slots_done, self.reduced = {}, None
        self.world.observe("applied", self, step, slots)
        yield Sleep(self._moment_s())
        self.feed(Applied(step))
        self.world.moment("applied", self)
        self._deal()
        return None
