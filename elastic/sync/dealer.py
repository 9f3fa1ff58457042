"""A worker's part in rounds that are dealt by speed: whose slots are whose, how many local steps, when to stop.

What a round leaves behind travels with its sum, as a few numbers of each slot, so that all workers deal the next one alike. The
decisions are `deals.py`'s; this file has the clock.
"""

from __future__ import annotations

import itertools
import statistics

import torch
from torch import Tensor

from elastic.domain import Plan, PlanKind
from elastic.sampler import SlotSampler
from elastic.sync.deals import Deals, DealtSampler, crew_of, deadline_s, deal, named


class Dealer:
    """Deals rounds for one worker.

    Args:
        sampler: of rounds as they are without it. every: local steps of a replica's round.

    Attributes:
        sampler: of rounds as they are dealt. extras: length of the float64 vector that a slot leaves behind.
    """

    def __init__(self, sampler: SlotSampler, every: int) -> None:
        self.deals = Deals()
        self.sampler = DealtSampler(
            sampler.dataset_size, sampler.batch_size, sampler.slots, sampler.seed, sampler.shuffle, sampler.drop_last, self.deals
        )
        self.extras = 3 * sampler.slots
        self._every = every
        self._batch_size = sampler.batch_size // every
        self._marks: list[float] = []  # when the local steps of the slot in progress began
        self._deadline = float("inf")
        self._ticked = 0  # steps that schedules have taken for the slot in progress

    # -- whose is what -------------------------------------------------------------------------------------------------

    def take_up(self, plan: Plan, step: int, kept: int) -> bool:
        """Deal the round in progress for a world; returns whether it was dealt otherwise before.

        Args:
            kept: after a fault, the world as dealt for which all who are left have this round; 0 if they do not agree.
        """
        dealt = self.deals.present
        is_old = dealt is not None and dealt.step == step
        if dealt is not None and is_old:
            if dealt.generation == plan.generation:
                return False
            if plan.kind is PlanKind.FENCE and dealt.generation == kept:
                # Nothing may be owed at the end of an epoch: then others compute what was lost.
                self.deals.present = dealt if self.is_last(step) else dealt.among(plan.workers())
                return False
        crews = [named(crew) for crew in plan.crews()]
        self.deals.present = deal(self.deals.books, crews, self.sampler, plan.generation, self._batch_size)
        return is_old

    @property
    def generation(self) -> int:
        """The world that the round in progress is dealt for; 0: none."""
        return 0 if self.deals.present is None else self.deals.present.generation

    def forget(self) -> None:
        """All go on from a snapshot, by whoever it was dealt."""
        self.deals.present = None

    def owners(self, plan: Plan, step: int) -> tuple[int, ...]:
        """Return the rank that computes each slot of the round in progress, or of the newest one, in a world.

        Of a crew that is the first one; what a lost crew had, if others compute it, is dealt to theirs in turn.
        """
        books, dealt = self.deals.books, self.deals.present
        workers = dealt.workers if dealt is not None and dealt.step == step else books.workers
        if not workers:
            return plan.owners  # nothing has been dealt yet, or this worker is yet to be told
        crews = [self._ranks(plan, name) for name in workers]
        first = [ranks[0] for ranks in crews if ranks] or [0]
        return tuple(ranks[0] if ranks else first[slot % len(first)] for slot, ranks in enumerate(crews))

    def place_of(self, worker: str, step: int) -> tuple[int, str] | None:
        """Return the slot of the round in progress that a worker trains, and as whose replica; None if it has none."""
        dealt = self.deals.present
        slot = dealt.slot_of(worker) if dealt is not None and dealt.step == step else None
        return None if slot is None or dealt is None else (slot, dealt.workers[slot])

    def _ranks(self, plan: Plan, name: str) -> tuple[int, ...]:
        """The ranks of a crew, in its order; none unless all of it is there."""
        ranks = {member.worker: member.rank for member in plan.members}
        crew = crew_of(name)
        return tuple(ranks[worker] for worker in crew) if all(worker in ranks for worker in crew) else ()

    def crews(self, plan: Plan, step: int) -> list[tuple[int, ...]]:
        """Return the ranks of each crew that trains a replica in the round in progress."""
        dealt = self.deals.present
        workers = dealt.workers if dealt is not None and dealt.step == step else ()
        return [ranks for name in workers if (ranks := self._ranks(plan, name))]

    def is_last(self, step: int) -> bool:
        """Whether an epoch ends with a round: then nobody owes anything."""
        return self.sampler.epoch_of(step + 1) != self.sampler.epoch_of(step)

    # -- local steps ---------------------------------------------------------------------------------------------------

    def pieces(self, step: int, slot: int) -> list[tuple[int, tuple[int, ...]]]:
        """Return place and sample ids of each local step of a slot; of a later round nothing is known."""
        dealt = self.deals.present
        if dealt is not None and step > dealt.step:
            return []
        ids, size = self.sampler.ids(step, slot), self._batch_size
        batches = [ids[start : start + size] for start in range(0, len(ids), size)] or [()]
        first = slot * (self.sampler.dataset_size + 1)  # no slot has as many local steps
        return [(first + number, batch) for number, batch in enumerate(batches)]

    def ticks(self, step: int, done: int, count: int, *, is_last: bool) -> int:
        """Return how many steps of schedules go with local step `done` (from 1) of a replica that takes `count`.

        All replicas come to as many in a round, whatever their local steps: as many as these are where all are as fast.
        """
        whole = max(1, min(self._every, self.sampler.nominal_samples(step) // (self._batch_size * self.sampler.slots)))
        before, self._ticked = (0 if done == 1 else self._ticked), whole if is_last else whole * done // count
        return self._ticked - before

    def begin(self, step: int, now: float) -> None:
        """The replica's local steps begin."""
        dealt = self.deals.present
        self._marks, self._deadline = [now], float("inf")
        if dealt is not None and not self.is_last(step):
            self._deadline = now + deadline_s(self.deals.books, dealt, self._batch_size)

    def stepped(self, now: float) -> bool:
        """A local step is over; returns whether it is too late for another one."""
        self._marks.append(now)
        return now > self._deadline

    # -- what a round leaves behind ------------------------------------------------------------------------------------

    def report(self, slot: int, used: int, weight: float) -> Tensor:
        """Return what a slot leaves behind, [extras]: samples used, seconds of a local step, and what its gradient weighs."""
        each = [after - before for before, after in itertools.pairwise(self._marks)]
        slots = self.sampler.slots
        vector = torch.zeros(self.extras, dtype=torch.float64)
        vector[slot], vector[slots + slot], vector[2 * slots + slot] = used, statistics.median(each), weight
        return vector

    def weight_of_all(self, reported: Tensor) -> float:
        """Return what the gradients in a round's sum weigh together, as a divisor: 1 where there are none."""
        return float(reported[2 * self.sampler.slots :].sum()) or 1.0

    def close(self, reported: Tensor) -> list[int]:
        """A round is committed, and this is the sum of what its slots left behind; returns the slots that have used anything."""
        used, seconds, weights = reported.view(3, self.sampler.slots).tolist()
        self.sampler.close([int(count) for count in used], seconds, [weight > 0 for weight in weights])
        return [slot for slot, count in enumerate(used) if count]
