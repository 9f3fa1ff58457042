"""Deal the slots of a step to workers.

Two situations, two functions. At a step boundary nothing is in progress, so slots go back to the layout that is
cheapest to reduce: whole virtual replicas to single workers (`deal_afresh`). In the middle of a step the survivors have
finished slots in their hands, so each keeps what it owns and only orphans move (`deal_orphans`). Both balance by
least-loaded-first, which is optimal for equal slots (the tests hold it against brute force).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastic.folds import blocks


def deal_afresh(slots: int, virtual_replicas: int, workers: Sequence[str]) -> tuple[str, ...]:
    """Return the owner of each slot when every worker starts the step with empty hands.

    Worker i is at home in virtual replica i, so a whole world (as many workers as replicas) exchanges one partial sum
    each. Replicas without a home worker are dealt slot by slot; workers without a home replica take slots from the
    ends of the longest ones.
    """
    owner: list[str | None] = [None] * slots
    load = dict.fromkeys(workers, 0)
    for home, worker in zip(blocks(slots, virtual_replicas), workers, strict=False):
        for slot in home:
            owner[slot] = worker
            load[worker] += 1
    return _level(_deal_rest(owner, load, workers), workers)


def deal_orphans(owners: Sequence[str], survivors: Sequence[str]) -> tuple[str, ...]:
    """Return the owner of each slot after a loss: survivors keep theirs, orphans go to the least loaded."""
    alive = set(survivors)
    kept: list[str | None] = [owner if owner in alive else None for owner in owners]
    load = dict.fromkeys(survivors, 0)
    for owner in kept:
        if owner is not None:
            load[owner] += 1
    return _level(_deal_rest(kept, load, survivors), survivors)


def _deal_rest(owner: Sequence[str | None], load: dict[str, int], workers: Sequence[str]) -> list[str]:
    """Give each slot without an owner to the worker with the fewest; ties go to the lowest rank."""
    dealt: list[str] = []
    for current in owner:
        if current is None:
            current = min(workers, key=load.__getitem__)
            load[current] += 1
        dealt.append(current)
    return dealt


def _level(owners: Sequence[str], workers: Sequence[str]) -> tuple[str, ...]:
    """Move single slots from the most to the least loaded until no two workers differ by more than one.

    Taken from the end of the giver's slots: the beginning of a virtual replica stays one partial sum.
    """
    dealt = list(owners)
    load: Mapping[str, int] = {worker: dealt.count(worker) for worker in workers}
    while True:
        least = min(workers, key=load.__getitem__)
        most = max(workers, key=load.__getitem__)
        if load[most] - load[least] <= 1:
            return tuple(dealt)
        last = max(slot for slot, owner in enumerate(dealt) if owner == most)
        dealt[last] = least
        load = {**load, most: load[most] - 1, least: load[least] + 1}
