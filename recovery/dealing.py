"""Deal the slots of a step to workers.

Two situations, two functions, and a third for workers that are not alike. At a step boundary nothing is in progress, so
slots go back to the layout that is cheapest to reduce: whole virtual replicas to single workers (`deal_afresh`). In the
middle of a step the survivors have finished slots in their hands, so each keeps what it owns and only orphans move
(`deal_orphans`). Both balance by least-loaded-first, which is optimal for equal slots (the tests hold it against brute
force).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from elastic.folds import blocks

W = TypeVar("W", bound=Hashable)
"""What a worker is called: a name or a number."""


def deal_afresh(slots: int, virtual_replicas: int, workers: Sequence[W]) -> tuple[W, ...]:
    """Return the owner of each slot when every worker starts the step with empty hands.

    Worker i is at home in virtual replica i, so a whole world (as many workers as replicas) exchanges one partial sum
    each. Replicas without a home worker are dealt slot by slot; workers without a home replica take slots from the
    ends of the longest ones.
    """
    owner: list[W | None] = [None] * slots
    load = dict.fromkeys(workers, 0)
    for home, worker in zip(blocks(slots, virtual_replicas), workers, strict=False):
        for slot in home:
            owner[slot] = worker
            load[worker] += 1
    return _level(_deal_rest(owner, load, workers), workers)


def deal_orphans(owners: Sequence[W], survivors: Sequence[W]) -> tuple[W, ...]:
    """Return the owner of each slot after a loss: survivors keep theirs, orphans go to the least loaded."""
    alive = set(survivors)
    kept: list[W | None] = [owner if owner in alive else None for owner in owners]
    load = dict.fromkeys(survivors, 0)
    for owner in kept:
        if owner is not None:
            load[owner] += 1
    return _level(_deal_rest(kept, load, survivors), survivors)


def deal_by_speed(slots: int, speeds: Mapping[W, float]) -> tuple[W, ...]:
    """Return the owner of each slot such that the last worker to end does so as early as can be.

    Slot by slot to whoever will have done it first, so that what is downstream gets slots in about their order.

    Args:
        speeds: of each worker, above 0.
    """
    load = dict.fromkeys(speeds, 0)
    dealt = []
    for _ in range(slots):
        first = min(speeds, key=lambda worker: (load[worker] + 1) / speeds[worker])
        load[first] += 1
        dealt.append(first)
    return tuple(dealt)


def _deal_rest(owner: Sequence[W | None], load: dict[W, int], workers: Sequence[W]) -> list[W]:
    """Give each slot without an owner to the worker with the fewest; ties go to the lowest rank."""
    dealt: list[W] = []
    for current in owner:
        if current is None:
            current = min(workers, key=load.__getitem__)
            load[current] += 1
        dealt.append(current)
    return dealt


def _level(owners: Sequence[W], workers: Sequence[W]) -> tuple[W, ...]:
    """Move single slots from the most to the least loaded until no two workers differ by more than one.

    Taken from the end of the giver's slots: the beginning of a virtual replica stays one partial sum.
    """
    dealt = list(owners)
    load: Mapping[W, int] = {worker: dealt.count(worker) for worker in workers}
    while True:
        least = min(workers, key=load.__getitem__)
        most = max(workers, key=load.__getitem__)
        if load[most] - load[least] <= 1:
            return tuple(dealt)
        last = max(slot for slot, owner in enumerate(dealt) if owner == most)
        dealt[last] = least
        load = {**load, most: load[most] - 1, least: load[least] + 1}
