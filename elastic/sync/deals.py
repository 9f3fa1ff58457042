"""Who trains on how much of a round, where replicas take as many local steps as they have time for. Pure.

A round has as many samples as ever. They are dealt to its replicas, one for each worker, by how fast each has been (dynamic local
updates: arXiv 2401.09135, section 5). What a replica does not come to (it was lost, or late) is owed, and dealt with the next
round: so each sample is used once, by whoever it was. Replicas keep their numbers (slots) as long as their workers live.

Where several workers train a replica between them (an island), they are a crew, which has a slot as long as it has the same
members.

Everything here follows from what a step leaves behind on all workers alike, from the plan, and from the sampler. This file must
never know a clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any

from elastic.sampler import SlotSampler

PATIENCE = 0.25
"""By what share a round may take longer than expected before a replica that is not done leaves the rest for later ..."""
PATIENCE_S = 0.5
"""... and by how much, in any case."""
NOBODY = ""
_BETWEEN = "\n"


def named(crew: Sequence[str]) -> str:
    """Return how the workers of a replica are called together; one alone is called as it is."""
    return _BETWEEN.join(crew)


def crew_of(name: str) -> tuple[str, ...]:
    """The inverse of `named`."""
    return tuple(name.split(_BETWEEN)) if name else ()


@dataclass(frozen=True, slots=True)
class Deal:
    """What is dealt to each slot of one round; slot after slot a run of the round's samples.

    Attributes:
        step: the round. generation: the world that it was dealt for.
        workers: whose replica each slot is (a crew, as it is `named`); NOBODY where there is none.
        sizes: samples of each slot.
        forgone: slots whose replicas are lost with what they had used and never reported.
        absent: slots that were lost after the round was dealt.
    """

    step: int
    generation: int
    workers: tuple[str, ...]
    sizes: tuple[int, ...]
    forgone: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()

    def slot_of(self, worker: str) -> int | None:
        """Return the slot of the replica that this worker trains, if need be with others; None if there is none."""
        return next((slot for slot, name in enumerate(self.workers) if worker in crew_of(name)), None)

    def among(self, workers: Collection[str]) -> Deal:
        """Return the deal where only these workers are left: a crew that has lost one has lost all."""
        lost = (slot for slot, name in enumerate(self.workers) if not set(crew_of(name)) <= set(workers))
        return replace(self, absent=tuple(lost))


@dataclass(frozen=True, slots=True)
class Books:
    """What all know after a round.

    Attributes:
        step: the newest round.
        owed: ids of samples of this and earlier rounds that nobody has used.
        workers: whose replica each slot was.
        seconds: what a local step of each took; 0 where that is not known.
        unreported: ids of samples that each has used since it last gave what it had learnt.
    """

    step: int = 0
    owed: tuple[int, ...] = ()
    workers: tuple[str, ...] = ()
    seconds: tuple[float, ...] = ()
    unreported: tuple[tuple[int, ...], ...] = ()

    def seconds_of(self, worker: str) -> float:
        """Return what a local step of a worker took; 0 if that is not known."""
        return self.seconds[self.workers.index(worker)] if worker in self.workers else 0.0

    def forgone(self, members: Collection[str]) -> tuple[int, ...]:
        """Return the slots that are nobody's any more, and have used samples in vain."""
        return tuple(s for s, worker in enumerate(self.workers) if worker not in members and self.unreported[s])

    def owed_to(self, forgone: Sequence[int]) -> tuple[int, ...]:
        """Return the ids that a round begins with, if these slots are lost."""
        return (*self.owed, *(sample for slot in forgone for sample in self.unreported[slot]))


def deal(books: Books, members: Sequence[str], sampler: DealtSampler, generation: int, batch_size: int) -> Deal:
    """Deal the next round by the speed of its members.

    Args:
        books: as of the round before. members: crews of the world, as they are `named`; those beyond the slots get nothing.
        sampler: of the rounds. generation: of the world. batch_size: of a local step.
    """
    step = books.step + 1
    forgone = books.forgone(members)
    samples = sampler.nominal_samples(step) + len(books.owed_to(forgone))
    workers = _seated(books.workers, members, sampler.slots)
    counts = shares(-(-samples // batch_size), [_weight(books, worker, workers) for worker in workers])
    bounds = [min(end * batch_size, samples) for end in accumulate(counts, initial=0)]
    sizes = tuple(end - start for start, end in pairwise(bounds))
    return Deal(step, generation, workers, sizes, forgone)


def _seated(before: Sequence[str], members: Sequence[str], slots: int) -> tuple[str, ...]:
    """Who has which slot: whoever had one keeps it, and the others take those that are free."""
    seats = [worker if worker in members else NOBODY for worker in before] + [NOBODY] * (slots - len(before))
    come = iter(worker for worker in members if worker not in seats)
    return tuple(worker or next(come, NOBODY) for worker in seats)


def _weight(books: Books, worker: str, workers: Sequence[str]) -> float:
    """How fast a worker is, beside the others; one that has not been seen yet is as fast as they are together."""
    if worker == NOBODY:
        return 0.0
    if seconds := books.seconds_of(worker):
        return 1 / seconds
    known = [1 / seconds for other in workers if other and (seconds := books.seconds_of(other))]
    return sum(known) / len(known) if known else 1.0


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a number by weights: whole numbers by largest remainder, at least 1 for each that weighs anything if it suffices."""
    weighing = [slot for slot, weight in enumerate(weights) if weight > 0]
    parts = [0] * len(weights)
    for slot in weighing[:total]:
        parts[slot] = 1
    rest, all_of_it = total - sum(parts), sum(weights)
    exact = [rest * weight / all_of_it for weight in weights]
    for slot, share in enumerate(exact):
        parts[slot] += int(share)
    by_remainder = sorted(weighing, key=lambda slot: (int(exact[slot]) - exact[slot], slot))
    for slot in by_remainder[: total - sum(parts)]:
        parts[slot] += 1
    return parts


def deadline_s(books: Books, dealt: Deal, batch_size: int) -> float:
    """Return how long a replica's local steps may take before the others have waited long enough; infinity if nobody waits."""
    expected = expected_s(books, dealt, batch_size)
    waiting = [size for slot, size in enumerate(dealt.sizes) if size and slot not in dealt.absent]
    if not expected or len(waiting) == 1:
        return float("inf")
    return max((1 + PATIENCE) * expected, expected + PATIENCE_S)


def expected_s(books: Books, dealt: Deal, batch_size: int) -> float:
    """Return how long the local steps of a round should take, with what is known of its replicas; 0 if that is nothing."""
    each = zip(dealt.workers, dealt.sizes, strict=True)
    return max(-(-size // batch_size) * books.seconds_of(worker) for worker, size in each)


@dataclass(slots=True)
class Deals:
    """The deal of a round, and the books it follows from: part of the training state.

    Attributes:
        books: as of the newest round. present: the deal of the round in progress; None: it is yet to be dealt.
        settled: of the newest round, for each slot the ids of which it has given what it learnt.
    """

    books: Books = field(default_factory=Books)
    present: Deal | None = None
    settled: tuple[tuple[int, ...], ...] = ()

    def close(
        self, used: Sequence[tuple[int, ...]], owed: Iterable[int], seconds: Sequence[float], reported: Sequence[bool]
    ) -> None:
        """The round in progress is committed, and another one is to be dealt.

        Args:
            used: ids that each slot has used. owed: those that nobody has. seconds: what the local steps of each slot took.
            reported: whether it has given all that it has learnt since it last did.
        """
        dealt, books = self.present, self.books
        assert dealt is not None
        before = [
            books.unreported[slot] if slot < len(books.workers) and books.workers[slot] == worker else ()
            for slot, worker in enumerate(dealt.workers)
        ]
        since = [(*earlier, *now) for earlier, now in zip(before, used, strict=True)]
        self.settled = tuple(ids if gave else () for ids, gave in zip(since, reported, strict=True))
        unreported = tuple(() if gave else ids for ids, gave in zip(since, reported, strict=True))
        self.books = Books(dealt.step, tuple(owed), dealt.workers, tuple(seconds), unreported)
        self.present = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a joiner needs."""
        return {"books": _plain(self.books), "present": None if self.present is None else _plain(self.present)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        books, present = state["books"], state["present"]
        self.books = Books(**{name: _tupled(value) for name, value in books.items()})
        self.present = None if present is None else Deal(**{name: _tupled(value) for name, value in present.items()})
        self.settled = ()


def _plain(record: Deal | Books) -> dict[str, Any]:
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _tupled(value: Any) -> Any:
    return tuple(_tupled(each) for each in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class DealtSampler(SlotSampler):
    """A sampler of rounds that are dealt as `deals` says.

    Of the round in progress a slot has what is dealt to it; of the newest one that is committed, what counts as used by then; of
    any other round, what the plain sampler says.
    """

    deals: Deals = field(default_factory=Deals)

    def nominal_samples(self, step: int) -> int:
        """Samples of a round without what is owed."""
        return super().samples(step)

    def samples(self, step: int) -> int:
        return sum(self.sizes(step)) if step == self.deals.books.step else super().samples(step)

    def samples_until(self, step: int) -> int:
        books = self.deals.books
        return super().samples_until(step) - len(books.owed) - sum(len(ids) for ids in books.unreported)

    def sizes(self, step: int) -> tuple[int, ...]:
        dealt = self.deals.present
        if dealt is not None and dealt.step == step:
            return tuple(0 if slot in dealt.absent else size for slot, size in enumerate(dealt.sizes))
        if self.deals.settled and step == self.deals.books.step:
            return tuple(len(ids) for ids in self.deals.settled)
        return super().sizes(step)

    def ids(self, step: int, slot: int) -> tuple[int, ...]:
        dealt = self.deals.present
        if dealt is not None and dealt.step == step:
            return () if slot in dealt.absent else self.dealt_ids(dealt)[slot]
        if self.deals.settled and step == self.deals.books.step:
            return self.deals.settled[slot]
        return super().ids(step, slot)

    def dealt_ids(self, dealt: Deal) -> list[tuple[int, ...]]:
        """Return for each slot all that a deal of the next round has for it."""
        every = list(self.deals.books.owed_to(dealt.forgone))
        for slot in range(self.slots):
            every += super().ids(dealt.step, slot)
        ends = list(accumulate(dealt.sizes, initial=0))
        return [tuple(every[start:end]) for start, end in pairwise(ends)]

    def close(self, used: Sequence[int], seconds: Sequence[float], reported: Sequence[bool]) -> None:
        """The round in progress is committed: of each slot the first `used` samples were, and the others are owed."""
        dealt = self.deals.present
        assert dealt is not None
        each = list(zip(self.dealt_ids(dealt), used, strict=True))
        owed = (sample for ids, count in each for sample in ids[count:])
        self.deals.close([ids[:count] for ids, count in each], owed, seconds, reported)
