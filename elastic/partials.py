"""What this worker has of a step's sum: a left fold in progress for each term that it computes.

Partial sums outlive a world. When the assignment changes, those whose finished slots are the beginning of
what is needed now are kept, and the others are dropped. The file must never add anything in an order that
the fold does not have, and must never communicate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from elastic.flat import Bucket, Layout, Memory, fill_with_nothing
from elastic.folds import Term


@dataclass(eq=False)
class Partial:
    """A left fold in progress: the sum of the finished slots, in the order in which they were added.

    Attributes:
        memory: the sum; what is not `present` is undefined until `complete`.
        slots: the slots that are in it.
        present: which parameters got a gradient from any of them.
        has_extras: whether the extras were given by any of them.
    """

    memory: Memory
    slots: tuple[int, ...] = ()
    present: list[bool] = field(default_factory=list)
    has_extras: bool = False

    def __post_init__(self) -> None:
        self.present = [False] * len(self.memory.views)

    def add(self, index: int, gradient: torch.Tensor) -> None:
        """Add one parameter's gradient; the first one is copied, which is the same and saves filling."""
        view = self.memory.views[index]
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if self.present[index]:
            view.add_(gradient)
        else:
            view.copy_(gradient)
            self.present[index] = True

    def add_extras(self, extras: torch.Tensor) -> None:
        """Add one slot's extras."""
        if self.has_extras:
            self.memory.extras.add_(extras)
        else:
            self.memory.extras.copy_(extras)
            self.has_extras = True

    def complete(self, bucket: Bucket) -> None:
        """Define what nobody has written in a bucket."""
        for index in bucket.parameters:
            if not self.present[index]:
                fill_with_nothing(self.memory.views[index])
        if not bucket.parameters:
            self.memory.presence.copy_(torch.tensor(self.present, dtype=torch.float64))
            if not self.has_extras:
                fill_with_nothing(self.memory.extras)

    def absorb(self, other: Partial, buckets: Iterable[Bucket]) -> None:
        """Add another fold to this one, as one addition for each element."""
        for bucket in buckets:
            self.complete(bucket)
            other.complete(bucket)
        for mine, theirs in zip(self.memory.flats, other.memory.flats, strict=True):
            mine.add_(theirs)
        self.present = [a or b for a, b in zip(self.present, other.present, strict=True)]
        self.has_extras |= other.has_extras
        self.slots += other.slots


@dataclass(eq=False)
class LocalTerm:
    """A term that this worker computes: the sum of its first parts, and parts that wait to be added to it."""

    term: Term
    total: Partial | None = None
    waiting: dict[int, Partial] = field(default_factory=dict)

    def held(self) -> Iterator[Partial]:
        """The partial sums that there are."""
        if self.total is not None:
            yield self.total
        yield from self.waiting.values()

    def finished(self) -> set[int]:
        """The slots that are in them."""
        return {slot for partial in self.held() for slot in partial.slots}

    def adopt(self, partial: Partial) -> bool:
        """Take a partial sum over, if its slots are the beginning of what is needed here."""
        count = len(partial.slots)
        if partial.slots == self.term.slots[:count] and (count <= len(self.term.parts[0]) or count in self._borders()):
            self.total = partial
            return True
        for index, part in enumerate(self.term.parts):
            if index and partial.slots == part[:count]:
                self.waiting[index] = partial
                return True
        return False

    def next_part(self) -> int:
        """The first part that is not yet in the total."""
        count = len(self.total.slots) if self.total else 0
        return sum(border <= count for border in self._borders())

    def part_of(self, slot: int) -> int:
        """The part that a slot belongs to."""
        return next(index for index, part in enumerate(self.term.parts) if slot in part)

    def _borders(self) -> list[int]:
        """How many slots have been added after each part."""
        sizes = [len(part) for part in self.term.parts]
        return [sum(sizes[: index + 1]) for index in range(len(sizes))]


class PartialSums:
    """The partial sums of one worker, and the memory that they need: one set for each, and no more.

    Args:
        layout: of the gradients.
        is_ordered: whether the order of the slots matters. If not, whatever is finished may stay.
    """

    def __init__(self, layout: Layout, *, is_ordered: bool) -> None:
        self._layout = layout
        self._is_ordered = is_ordered
        self._spare: list[Memory] = []
        self.terms: list[LocalTerm] = []
        self._term_of: dict[int, LocalTerm] = {}

    def plan(self, terms: Iterable[Term]) -> None:
        """Turn to other terms, and keep what can be kept."""
        held = [partial for local in self.terms for partial in local.held()]
        self.terms = [LocalTerm(term) for term in terms]
        self._term_of = {slot: local for local in self.terms for slot in local.term.slots}
        for partial in held:
            if not partial.slots or not self._adopt(partial):
                self._spare.append(partial.memory)
        for local in self.terms:
            self._merge(local)
        self._trim()

    def reserve(self) -> None:
        """Allocate the memory of one partial sum ahead of its use."""
        if not self._spare and not any(True for local in self.terms for _ in local.held()):
            self._spare.append(self._layout.allocate())

    def remaining_slots(self) -> tuple[int, ...]:
        """The slots that are still to be computed, in the order in which to do it."""
        return tuple(sorted(slot for local in self.terms for slot in set(local.term.slots) - local.finished()))

    def partial_for(self, slot: int) -> Partial:
        """The partial sum that a slot is to be added to.

        Raises:
            ValueError: the slot is not computed here, is finished, or would come too early.
        """
        local = self._term_of.get(slot)
        if local is None or slot in local.finished():
            raise ValueError(f"Slot {slot} is not among the remaining slots {self.remaining_slots()}.")
        index = local.part_of(slot)
        partial = local.waiting.get(index) if index else local.total
        finished = partial.slots if partial else ()
        if local.term.parts[index][: len(finished) + 1] != (*finished, slot):
            raise ValueError(f"Slot {slot} comes too early: the order is {self.remaining_slots()}.")
        if partial is None:
            partial = Partial(self._spare.pop() if self._spare else self._layout.allocate())
            if index:
                local.waiting[index] = partial
            else:
                local.total = partial
        return partial

    def finish_slot(self, slot: int, partial: Partial) -> None:
        """Note that all of a slot is in its partial sum."""
        partial.slots += (slot,)
        self._merge(self._term_of[slot])

    def is_whole_after(self, slot: int) -> bool:
        """Whether the sums are complete once a slot is: it is the last one, and nothing is merged."""
        return self.remaining_slots() == (slot,) and len(self._term_of[slot].term.parts) == 1

    def totals(self) -> dict[int, Partial]:
        """For the index of each term, its sum."""
        return {local.term.index: local.total for local in self.terms if local.total is not None}

    def drop(self, partial: Partial) -> None:
        """Forget one partial sum: its slots remain to be computed."""
        for local in self.terms:
            if local.total is partial:
                local.total = None
            local.waiting = {i: p for i, p in local.waiting.items() if p is not partial}
        self._spare.append(partial.memory)

    def clear(self) -> None:
        """Forget all of them: the next step begins."""
        for local in self.terms:
            for partial in tuple(local.held()):
                self.drop(partial)
        self._trim()

    def _adopt(self, partial: Partial) -> bool:
        if self._is_ordered:
            return any(local.adopt(partial) for local in self.terms)
        local = self.terms[0] if self.terms else None
        if local is None or local.total is not None or not set(partial.slots) <= set(local.term.slots):
            return False
        rest = tuple(slot for slot in local.term.slots if slot not in partial.slots)
        local.term = replace(local.term, parts=((*partial.slots, *rest),))
        local.total = partial
        return True

    def _merge(self, local: LocalTerm) -> None:
        """Add complete parts to the total, as far as they follow one upon the other."""
        while True:
            index = local.next_part()
            part = local.waiting.get(index)
            if part is None or part.slots != local.term.parts[index]:
                return
            assert local.total is not None  # part 0 never waits
            local.total.absorb(part, self._layout.buckets)
            self._spare.append(local.waiting.pop(index).memory)

    def _trim(self) -> None:
        """Keep no more spare memory than the present terms can use."""
        needed = sum(min(len(local.term.parts), 2) for local in self.terms)
        used = sum(1 for local in self.terms for _ in local.held())
        del self._spare[max(needed - used, 0) :]
