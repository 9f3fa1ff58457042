"""The rounds of a worker whose replicas train by themselves for some steps, and what is alike in all ways to agree then.

A round is a step of the job, and a slot of it one replica: `every` batches, each with an update of its own. What the replica
has moved is then what a slot's gradient is elsewhere: it is exchanged, voted on and applied, so that a loss, a join or a
restart finds everything as it always is. A slot whose worker is lost is computed again by another one. How replicas agree is a
subclass's: `diloco.py`, by an outer optimizer for all; `noloco.py`, by pairs.

What the inner optimizers have learnt belongs to a replica alone: it is neither sent nor captured, and begins anew where the
replica goes to another worker.

With `dynamic` a round is dealt by speed (`dealer.py`): then a worker has one replica, which may take more or fewer local steps
than others, and what a lost one has computed is not computed again, but dealt with the next round.

There, several workers of an island may train one replica between them (`crew.py`): each computes a share of each local step, and
the first one gives what the replica has moved.

With an overlap the sum of a round is made while the first local steps of the next one are taken: a worker then runs ahead of
what is committed, by part of a slot, which is thrown away if the world breaks meanwhile. This file must never let local
parameters be taken for committed ones.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from elastic.capture import Capturer
from elastic.control import Coordinator
from elastic.domain import Plan
from elastic.engine import Slot
from elastic.errors import CollectiveAborted, ConfigError
from elastic.failpoints import FailPoint, reach_inside
from elastic.group import Group, GroupPart, Messages
from elastic.measures import EXTRAS
from elastic.memory import SnapshotMemory
from elastic.progress import Operation
from elastic.protocol import CollectiveBroke, Dealt
from elastic.reduction import Reduced, Reducer
from elastic.replica import Parts, ReplicaEngine
from elastic.sampler import SlotSampler
from elastic.snapshots import SnapshotId, share_of
from elastic.state import TrainingState
from elastic.sync import Rounds, takes_crews
from elastic.sync.crew import Crew
from elastic.sync.dealer import Dealer
from elastic.sync.deals import NOBODY, crew_of

OUTER = "outer"
"""What an outer optimizer is called in the training state."""
TAG_PASS = 0x05357000
"""Apart from the tags of anything else on the same group; as many follow as there are buckets."""
THROWAWAY = -1
"""Nobody's replica: what is learnt of it is forgotten."""


class LocalEngine(ReplicaEngine, abc.ABC):
    """Drives the rounds of a worker; arguments as of `ReplicaEngine`.

    Args:
        sync: how rounds are made.
    """

    capture_every = 1  # rounds from one whose state can be captured to the next
    overlap = 0  # local steps of the next round during which the sum of a round is made

    def __init__(
        self,
        coordinator: Coordinator,
        parts: Parts,
        sampler: SlotSampler,
        *,
        sync: Rounds,
        snapshot_every: int = 0,
        **options: Any,
    ) -> None:
        self._dealer = Dealer(sampler, sync.local_steps) if sync.dynamic else None
        if self._dealer is not None:
            sampler, options = self._dealer.sampler, {**options, "more_extras": self._dealer.extras}
        super().__init__(coordinator, parts, sampler, **options)
        self.sync = sync
        self._phi = [parameter.detach().clone() for parameter in parts.parameters]
        self._learnt: dict[int, list[Any]] = {}  # slot -> what its inner optimizers have learnt
        self._schedules: dict[int, dict[str, Any]] = {}  # round -> what is alike for all replicas as it began
        self._done = 0  # local steps that the slot in progress has had
        self._is_cut_short = False  # it ends with these, since the others wait
        self._used = 0  # samples of them
        self._batch = 0  # samples of the one in progress, with those of the crew
        self._crew: Crew | None = None  # with whom this worker trains its replica, if not by itself
        self._name = NOBODY  # what the replica's workers are called together
        self._met_in = 0  # the generation in which they have last agreed on how far they are
        self._reached = (0, 0)  # round, local steps: how far that is here
        self._ended_round = 0  # the newest one whose local steps this worker has ended
        self._ticks = 1  # steps of schedules that go with the newest one
        self._is_real = False  # whether it is a replica of the round, and not one that is thrown away
        self._is_void = False  # the world has changed in the middle of it: it is complete, another worker's, or too early
        self._has_given = False  # the slot in progress is over, but for what user code does behind its last update
        self._flight: Flight | None = None  # the sum of the round before that of the slot in progress, if that runs ahead
        self._given: dict[str, list[float]] = {}  # measures of the slot in progress
        self._alike = {**parts.stateful, "elastic.inner": Hyperparameters(tuple(parts.optimizers.values()))}
        self._models = {**parts.models, **parts.more_models}
        self._stateful = {**self._alike, "elastic.measures": self.measures}
        if self._dealer is not None:
            self._stateful["elastic.deals"] = self._dealer.deals
        self.state = TrainingState(self._models, self._begin_agreement(), self._stateful, self.buffers.copies)
        if self.memory is not None and snapshot_every:
            capturer = Capturer(self.state, self.memory, buffers=3 if snapshot_every == 1 else 2)
            self.take_snapshots(capturer, snapshot_every, self.capture_every)

    # -- how replicas agree --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _begin_agreement(self) -> Mapping[str, Optimizer]:
        """Make what it takes to agree; returns what of it belongs to the captured state."""

    @abc.abstractmethod
    def _reducer_of(self, step: int) -> Reducer:
        """Return what sums up the contributions of a round's slots."""

    @abc.abstractmethod
    def _start_of(self, slot: int) -> Sequence[Tensor]:
        """Return the parameters that a replica begins a round with."""

    @abc.abstractmethod
    def _contribute(self, slot: int, weight: float | None) -> None:
        """A replica's local steps are over, and the parameters are its own: make what it gives `grad`, without autograd.

        `weight` is what the slot weighs among those of its round; None where all weigh the same.
        """

    @abc.abstractmethod
    def _agree(self, ahead: list[list[Tensor]]) -> None:
        """The round is committed, `grad` is the mean of what was given, and the parameters are the committed ones: step.

        `ahead` has the own parameters of a replica that is in its next round, to be brought up to date.
        """

    @abc.abstractmethod
    def _forget_replicas(self) -> None:
        """The round is committed without a step, since something was not finite: what replicas have of their own may be too."""

    @abc.abstractmethod
    def _keep_replicas(self, own: set[int], again: set[int]) -> None:
        """A round is dealt: forget what belongs to slots that are not this worker's own, or are computed again."""

    # -- local steps ---------------------------------------------------------------------------------------------------

    def pieces(self, step: int, slot: int) -> list[tuple[int, tuple[int, ...]]]:
        if self._dealer is not None:
            batches = self._dealer.pieces(step, slot)
            crew = self._crew if slot == self._crew_slot() else None
            # One without a share computes some sample for nothing.
            return batches if crew is None else [
                (place * crew.size + crew.number, crew.share(ids) or ids[:1]) for place, ids in batches
            ]
        ids = self.sampler.ids(step, slot)
        count = self._count_of(step)  # alike for all slots, so that schedulers are, too
        shares = [share_of(len(ids), number, count) for number in range(count)]
        return [(slot * self.sync.local_steps + number, ids[share.start : share.stop]) for number, share in enumerate(shares)]

    def _count_of(self, step: int) -> int:
        """Local steps of each replica in a round: fewer in an epoch's last one."""
        least = min(size for size in self.sampler.sizes(step) if size)
        full = self.sampler.batch_size // self.sync.local_steps
        return max(1, min(self.sync.local_steps, least // full))

    def next_slot(self) -> Slot | None:
        slot = self.slot
        if slot is not None and self._has_given:
            self._has_given = False
            self._schedules.setdefault(slot.step + 1, self._schedule())  # all replicas come to the same
        if slot is None or not slot.counts or self._has_ended(slot):
            return super().next_slot()
        self.beat()
        if len(self._stepped) < len(self.inner_steps):
            raise ConfigError(
                f"{len(self.inner_steps) - len(self._stepped)} of {len(self.inner_steps)} prepared optimizers were not stepped "
                f"in a local step of round {slot.step}: call every optimizer's step() once per iteration"
            )
        if not self._settle():
            return None
        if self.slot is not slot or self._has_ended(slot):
            return super().next_slot()  # the world goes on from elsewhere, or the replica is another worker's now
        return self._open_piece(slot)

    def _has_ended(self, slot: Slot) -> bool:
        return self._is_void or self._done >= self._steps_of(slot)

    def _steps_of(self, slot: Slot) -> int:
        """Local steps of a slot; one of a throwaway, which is there for the sake of what comes behind it."""
        if not (slot.counts and self._is_real):
            return 1
        if self._is_cut_short:
            return self._done
        return self._count_of(slot.step) if self._dealer is None else len(self._dealer.pieces(slot.step, slot.slot))

    def _open_slot(self, slot: Slot) -> Slot:
        """A slot begins: with the committed parameters, and what this worker has of its replica."""
        self._is_real = slot.counts and (
            slot.step > self.step or slot.slot in self.reducer.remaining_slots() or self._is_with_crew(slot)
        )
        self._is_void = self._has_given = False
        self._take(self._start_of(slot.slot) if self._is_real else self._phi)
        if slot.counts:
            self._begin_schedules(slot.step)
        self._turn_to(slot.slot if self._is_real else THROWAWAY)
        self._done, self._used, self._is_cut_short, self._given = 0, 0, False, {}
        if self._dealer is not None:
            self._dealer.begin(slot.step, time.monotonic())
        self.buffers.begin_slot()
        self.measures.begin_slot(len(slot.ids))
        if self._crew is not None and self._is_with_crew(slot):
            self._crew.begin_replica()
        return self._open_piece(slot)

    def _open_piece(self, slot: Slot) -> Slot:
        self._stepped.clear()
        self.committed_in_slot = False
        self.clips = []
        place, ids = self.pieces(slot.step, slot.slot)[self._done]
        self.slot = replace(slot, ids=ids, place=place)
        self.begin_slot(slot.step, slot.slot)
        self._batch = len(ids)
        if self._crew is not None and self._is_with_crew(slot):
            assert self._dealer is not None
            self._batch = len(self._dealer.pieces(slot.step, slot.slot)[self._done][1])
            self._crew.begin_step(self._batch)
        return self.slot

    def _begin_schedules(self, step: int) -> None:
        """All replicas of a round have the same learning rates, also those that a worker computes one after the other."""
        if step not in self._schedules:
            self._schedules[step] = self._schedule()
            return
        for name, thing in self._alike.items():
            thing.load_state_dict(copy.deepcopy(self._schedules[step][name]))

    def _schedule(self) -> dict[str, Any]:
        return {name: copy.deepcopy(thing.state_dict()) for name, thing in self._alike.items()}

    def _turn_to(self, slot: int) -> None:
        """Have the inner optimizers know what the slot's replica has learnt."""
        self._learnt.pop(THROWAWAY, None)
        learnt = self._learnt.setdefault(slot, [defaultdict(dict) for _ in self.parts.optimizers])
        for optimizer, mine in zip(self.parts.optimizers.values(), learnt, strict=True):
            optimizer.state = mine

    def _restore_parameters(self) -> None:
        self._take(self._phi)

    def _take(self, values: Sequence[Tensor]) -> None:
        """Make the parameters these."""
        with torch.no_grad():
            for parameter, value in zip(self.parts.parameters, values, strict=True):
                parameter.copy_(value)
                parameter.grad = None

    def _own(self) -> list[Tensor]:
        """The parameters as they are, copied."""
        return [parameter.detach().clone() for parameter in self.parts.parameters]

    def measure(self, name: str, value: float, call: str) -> None:
        """Take a local step's value: a slot's is the mean over its local steps."""
        self._refuse_outside_the_slot(call)
        if self._crew is not None and self.slot is not None and self._is_with_crew(self.slot):
            self._crew.measures.give(name, value)
        else:
            self._given.setdefault(name, []).append(value)

    def weigh(self, weight: float) -> None:
        """Refused. Raises ConfigError."""
        raise ConfigError(
            "session.weight() is for gradients that are summed over slots, and with sync=... none are: leave it out"
        )

    def clip(self, request: Callable[[], None]) -> None:
        """Clip the gradient of a local step, before its update."""
        if self.slot is not None:
            self.clips.append(request)

    @property
    def schedule_steps(self) -> int:
        """One for a local step; where replicas take different numbers of these, as many as bring all to the same in the end."""
        return self._ticks

    def _end_batch(self, slot: Slot) -> None:
        """All optimizers were stepped: a local step is over, with the last one the slot, and with the last slot the round."""
        if not slot.counts:
            self._say_warm()
        self.snapshots.finish()  # what is being captured are the committed parameters
        is_with_crew = self._is_with_crew(slot)
        if is_with_crew and not self._join_crew():
            return
        for deed in (*self.before_clipping, *self.clips, *self.inner_steps):
            deed()
        for parameter in self.parts.parameters:
            parameter.grad = None
        self._done += 1
        self._used += self._batch
        if is_with_crew:
            self._leave_step()
        elif self._dealer is not None and slot.counts and self._dealer.stepped(time.monotonic()):
            self._is_cut_short = True
        self._ticks = self._ticks_of(slot)
        if self._is_ahead() and self._done >= min(self.overlap, self._steps_of(slot) - 1) and self._commit_step():
            self._end_round_in_slot()
        if not slot.counts or self._done < self._steps_of(slot) or self._is_ahead():
            return
        if (slot.slot in self.reducer.remaining_slots() or self._is_with_crew(slot)) and not self._is_void:
            self._end_replica(slot)
        if self.reducer.remaining_slots():  # as it is now: the world may have changed in the middle of the slot
            return
        if self._ahead() is None:
            self._commit_step()
        else:
            reducer, divisor = self.reducer, self._divisor()
            self._flight = Flight(lambda: reducer.finish(divisor), self.parts.parameters[0].device)

    def _end_replica(self, slot: Slot) -> None:
        """What the replica has moved is its gradient."""
        for name, values in self._given.items():
            self.measures.give(name, math.fsum(values) / len(values))
        weight = self._weight_of(slot)
        if self._dealer is not None:
            self.measures.resize(self._used)
        gives = slot.slot in self.reducer.remaining_slots()
        if gives:
            self.reducer.begin_slot(slot.slot)
        with torch.no_grad():
            self._contribute(slot.slot, weight)
        if gives:
            self._end_slot()
        self._has_given, self._ended_round = True, slot.step
        self._restore_parameters()

    def _ticks_of(self, slot: Slot) -> int:
        if self._dealer is None or not slot.counts:
            return 1
        count = self._steps_of(slot)
        return self._dealer.ticks(slot.step, self._done, count, is_last=self._done >= count)

    def _weight_of(self, slot: Slot) -> float | None:
        """What a replica weighs among those of its round; None where all weigh the same."""
        if self._dealer is not None:
            return float(self._used) if self._reports(slot.slot) else 0.0
        sizes = self.sampler.sizes(slot.step)
        return float(sizes[slot.slot]) if len(set(sizes) - {0}) > 1 else None

    def _reports(self, slot: int) -> bool:
        """Whether a replica gives what it has moved at the end of this round."""
        return True

    def _more_of_slot(self) -> Sequence[Tensor]:
        slot = self.slot
        if self._dealer is None or slot is None:
            return ()
        return (self._dealer.report(slot.slot, self._used, self._weight_of(slot) or 0.0),)

    def _divisor(self) -> float | Callable[[Tensor], float]:
        dealer = self._dealer
        if dealer is None:
            return super()._divisor()
        return lambda folded: dealer.weight_of_all(folded[-dealer.extras :])

    def _owners(self, step: int, plan: Plan) -> Sequence[int]:
        return super()._owners(step, plan) if self._dealer is None else self._dealer.owners(plan, step)

    # -- a replica of several workers ----------------------------------------------------------------------------------

    def _crew_slot(self) -> int | None:
        """The slot of the round in progress that this worker trains with others; None if it does not, or one of them is lost."""
        if self._dealer is None or not self._crew_ranks():
            return None
        place = self._dealer.place_of(self.coordinator.settings.worker, self.step)
        return None if place is None else place[0]

    def _is_with_crew(self, slot: Slot) -> bool:
        """Whether a slot is trained with others, and not yet to its end."""
        return slot.counts and self._ended_round < slot.step == self.step and slot.slot == self._crew_slot()

    def _arrange_crew(self, plan: Plan) -> None:
        """Take up with whom this worker trains its replica, as the round is dealt."""
        dealer = self._dealer
        if dealer is None:
            if any(len(crew) > 1 for crew in plan.crews()):
                raise ConfigError(
                    f"nodes have the label island=..., and with {self.sync} each worker is a replica: pass dynamic=True to "
                    "DiLoCo or StreamingDiLoCo, use AsyncLocalSGD, or leave the label out"
                )
            return
        place = dealer.place_of(self.coordinator.settings.worker, self.step)
        name = NOBODY if place is None else place[1]
        crew = crew_of(name)
        if len(crew) > 1 and not takes_crews(self.sync):
            raise ConfigError(f"nodes have the label island=..., and pairs of {self.sync} are of workers: leave the label out")
        if name != self._name:
            self._name, self._learnt = name, {}
            self._forget_replicas()  # all members begin with the same
            if self._crew is not None:
                self._crew.close()
            self._crew = None
            if len(crew) > 1:
                number = crew.index(self.coordinator.settings.worker)
                self._crew, self._met_in = Crew(crew, number, self.parts, self._make_reducer), 0
        if self._crew is not None and not set(crew) <= plan.workers():
            self._crew.forget_step()  # it is lost with whom it has lost

    def _must_settle(self) -> bool:
        return self._met_in != self._generation and self._crew_ranks() != ()

    def _settle_state(self, joins: bool) -> None:
        """All members of the crew say how far they are. Raises CollectiveAborted."""
        assert self._crew is not None and self.group is not None
        step, done = self._reached
        self._crew.enter(self.group, self._crew_ranks(), done if step == self.step else 0)
        self._met_in = self._generation

    @property
    def _generation(self) -> int:
        return 0 if self.plan is None else self.plan.generation

    def _crew_ranks(self) -> tuple[int, ...]:
        """The ranks of the crew, if all of it is in the present world."""
        if self._crew is None or self.plan is None:
            return ()
        ranks = {member.worker: member.rank for member in self.plan.members}
        workers = self._crew.workers
        return tuple(ranks[worker] for worker in workers) if all(worker in ranks for worker in workers) else ()

    def _join_crew(self) -> bool:
        """Make the gradient of a local step that of all members; returns False if the replica is lost meanwhile."""
        crew, dealer = self._crew, self._dealer
        assert crew is not None and dealer is not None
        crew.end_step(is_late=dealer.stepped(time.monotonic()))
        while not crew.must_apply:
            try:
                with self._waiting(Operation.REDUCTION):
                    crew.reduce()
                break
            except CollectiveAborted as error:
                self.coordinator.feed(CollectiveBroke(str(error)))
            self._settle()
            if self._is_void or self._crew is not crew:
                crew.forget_step()
                return False
        self._is_cut_short |= crew.take()
        for name in crew.measures.given:
            self._given.setdefault(name, []).append(crew.measures.mean(name))
        return True

    def _leave_step(self) -> None:
        """A local step has been taken, which all members take."""
        assert self._crew is not None
        self._crew.forget_step()
        self._reached = self.step, self._done

    def _reducers_ranks(self) -> tuple[int, ...]:
        """Who sums up the round: the first of each crew; () if these are all."""
        assert self._dealer is not None and self.plan is not None
        crews = self._dealer.crews(self.plan, self.step)
        if all(len(crew) == 1 for crew in crews) and len(crews) == self.plan.world_size:
            return ()
        return tuple(crew[0] for crew in crews) or (0,)

    def _reduction(self, plan: Plan, group: Group) -> tuple[Messages, Sequence[int]]:
        if self._dealer is None or not (first := self._reducers_ranks()):
            return super()._reduction(plan, group)
        owners = self._owners(self.step, plan)
        if self.rank not in first:
            return GroupPart(group, (self.rank,)), [1] * len(owners)  # it has nothing to give
        return GroupPart(group, first), [first.index(rank) for rank in owners]

    def _sources(self, first: Sequence[int]) -> dict[int, int]:
        """From whom each rank that does not sum up itself gets the sum."""
        assert self._dealer is not None and self.plan is not None
        of_crew = {rank: crew[0] for crew in self._dealer.crews(self.plan, self.step) for rank in crew}
        ranks = (rank for rank in range(self.plan.world_size) if rank not in first)
        return {rank: of_crew.get(rank, first[0]) for rank in ranks}

    def _reduce_by_crews(self, first: Sequence[int]) -> Reduced:
        assert self.group is not None
        sources = self._sources(first)
        if self.rank not in first:
            return self.reducer.receive(self.group, sources[self.rank], TAG_PASS)
        reduced = super()._reduce()
        self.reducer.pass_on(self.group, [rank for rank, source in sources.items() if source == self.rank], TAG_PASS)
        return reduced

    # -- the next round, while the sum of this one is made -------------------------------------------------------------

    def _ahead(self) -> Slot | None:
        """Return the slot of the next round with which this worker may run ahead; None if it has to commit first.

        A joiner, a switch to another world or the end of the loop come with a commit, and are taken up before the slot ends.
        """
        assert self.plan is not None
        step = self.step + 1
        if not self.overlap or self.sampler.epoch_of(step) != self._loop_epoch or self._count_of(step) < 2:
            return None
        for slot in self.recorded_slots(step, self.plan, self.rank):
            if ids := self.sampler.ids(step, slot):
                return Slot(step, slot, ids, counts=True, is_last=False)
        return None

    def _is_ahead(self) -> bool:
        """Whether the slot in progress is of the round behind the one that is not yet committed."""
        slot = self.slot
        return slot is not None and slot.counts and not self._is_void and slot.step == self.step + 1

    def _choose(self) -> Slot:
        ahead = self._ahead() if self._flight is not None else None
        if ahead is not None:
            return ahead
        mine, remaining = self._crew_slot(), self.reducer.remaining_slots()
        is_next = mine not in remaining or remaining[0] == mine  # else the sum needs another one first
        if mine is not None and is_next and self._ended_round < self.step and (ids := self.sampler.ids(self.step, mine)):
            return Slot(self.step, mine, ids, counts=True, is_last=False)
        return super()._choose()

    def _reduce(self) -> Reduced:
        flight, self._flight = self._flight, None
        if self._dealer is not None and (first := self._reducers_ranks()):
            return self._reduce_by_crews(first)
        return super()._reduce() if flight is None else flight.land()

    def _end_round_in_slot(self) -> None:
        """A round was committed in the middle of a slot of the next one: do now what is done behind a commit."""
        assert self.plan is not None
        with self._as_committed():
            self.snapshots.step_ended(self.committed, self.plan.generation, time.monotonic())
            self.snapshots.finish()
            self._announce()

    @contextlib.contextmanager
    def _as_committed(self) -> Iterator[None]:
        """The parameters and schedules are those of the newest commit meanwhile: this worker may be in the middle of a slot."""
        local, schedule = self._own(), self._schedule()
        self._restore_parameters()
        if self.step in self._schedules:
            self._begin_schedules(self.step)
        try:
            yield
        finally:
            for name, thing in self._alike.items():
                thing.load_state_dict(schedule[name])
            self._take(local)

    # -- the end of a round --------------------------------------------------------------------------------------------

    def _update(self, step: int, reduced: Reduced, presence: Sequence[bool], *, commit: bool) -> None:
        ahead = (self._own(), self.buffers.held()) if self._is_ahead() else None
        self._restore_parameters()
        self.reducer.install(presence)
        slots = [slot for slot, size in enumerate(self.sampler.sizes(step)) if size]
        if self._dealer is not None:
            slots = self._dealer.close(reduced.extras[-self._dealer.extras :])
        reach_inside(FailPoint.APPLYING)
        if commit:
            with torch.no_grad():
                self._agree([] if ahead is None else [ahead[0]])
            self.buffers.commit(reduced.extras[: self.buffers.extras], slots)
        else:
            self.buffers.restore()
            self._learnt, self._is_void = {}, True
            self._forget_replicas()
        self.measures.commit(reduced.extras[self.buffers.extras : self.buffers.extras + EXTRAS])
        self._note_parameters()
        self._schedules = {begun: found for begun, found in self._schedules.items() if begun > step}
        if ahead is not None and commit:
            self._take(ahead[0])
            self.buffers.put(ahead[1])

    def _note_parameters(self) -> None:
        """The parameters are the committed ones, and another round begins with them."""
        with torch.no_grad():
            for parameter, phi in zip(self.parts.parameters, self._phi, strict=True):
                phi.copy_(parameter)
                parameter.grad = None

    def _plan_step(self) -> None:
        if self._flight is not None:
            self._flight.give_up()  # what it sums up is kept, and summed up anew
            self._flight = None
        self.reducer = self._reducer_of(self.step)
        assert self.plan is not None
        is_dealt_anew = False
        if self._dealer is not None and self.coordinator.machine.has_state:
            is_dealt_anew = self._dealer.take_up(self.plan, self.step, self._kept_deal)
            self.coordinator.feed(Dealt(self.step, self._dealer.generation))
            if is_dealt_anew:
                self._ended_round = min(self._ended_round, self.committed)
        self._arrange_crew(self.plan)
        super()._plan_step()
        if is_dealt_anew:  # what was computed of it is of no use
            self.reducer.clear()
            self._is_void, self._reached = True, (0, 0)
        own = set(self.recorded_slots(self.step, self.plan, self.rank))
        again = set(self.reducer.remaining_slots())
        if (mine := self._crew_slot()) is not None:
            own.add(mine)
            again |= set() if self._ended_round == self.step or not self.sampler.sizes(self.step)[mine] else {mine}
        self._learnt = {slot: learnt for slot, learnt in self._learnt.items() if slot in own}
        self._keep_replicas(own, again)
        slot = self.slot
        self._is_void |= slot is not None and slot.counts and (slot.step != self.step or slot.slot not in again)

    # -- the state -----------------------------------------------------------------------------------------------------

    def _pass_state(self, joiners: tuple[int, ...]) -> int | None:
        if self.rank in joiners:
            return super()._pass_state(joiners)
        with self._as_committed():
            return super()._pass_state(joiners)

    def _read_snapshot(self, memory: SnapshotMemory, snapshot: SnapshotId) -> None:
        super()._read_snapshot(memory, snapshot)
        if self._dealer is not None:
            self._dealer.forget()

    def _take_over(self) -> None:
        super()._take_over()
        self._note_parameters()
        self._learnt, self._schedules = {}, {}
        self._forget_replicas()
        self.slot = None

    def _leave_loop(self) -> None:
        if not self.committed_in_slot:
            self.slot = None
        self._flight = None  # nobody waits for what it does any more
        self._restore_parameters()
        super()._leave_loop()


class Flight:
    """A sum that another thread makes; the reducer is that thread's until it has landed."""

    def __init__(self, reduce: Callable[[], Reduced], device: torch.device) -> None:
        self._reduced: Reduced | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(reduce, device), name="overlap", daemon=True)
        self._thread.start()

    def _run(self, reduce: Callable[[], Reduced], device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            self._reduced = reduce()
        except Exception as error:
            self._error = error  # raised where it lands

    def land(self) -> Reduced:
        """Return the sum; each message in it has the group's deadline. Raises CollectiveAborted."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._reduced is not None
        return self._reduced

    def give_up(self) -> None:
        """Wait until it has ended, in a world that is over."""
        with contextlib.suppress(CollectiveAborted):
            self.land()


class Hyperparameters:
    """The settings of the inner optimizers, which schedulers change, as something that has a state."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        """Return them, without parameters."""
        groups = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in self._optimizers]
        return {"groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        for optimizer, groups in zip(self._optimizers, state["groups"], strict=True):
            for mine, theirs in zip(optimizer.param_groups, groups, strict=True):
                mine.update(theirs)
