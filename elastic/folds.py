"""The order of a step's sum: who folds what, what is sent as one piece, and how the pieces combine.

A floating-point sum depends on its order, so the order is a function of the slots alone: a left fold over the
virtual replicas, each a left fold over its own slots. Whoever computed a slot, the same additions happen, and
the same bits come out. This file says which runs of slots one worker may add up by itself (a term) without
changing any addition. It is pure arithmetic on small tuples: it must never see a tensor, a process group or a
clock.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

T = TypeVar("T")


class TermKind(enum.Enum):
    """What stretch of the fold a term covers."""

    TOTAL = "total"
    """Whole virtual replicas, from the first on: the running total itself."""
    PREFIX = "prefix"
    """The slots that begin one virtual replica."""
    SINGLE = "single"
    """One slot inside a virtual replica whose beginning belongs to somebody else."""
    SHARE = "share"
    """All slots of one worker, in any order."""


@dataclass(frozen=True)
class Term:
    """A piece of the sum that one worker computes and sends as a whole.

    Attributes:
        index: its place in the fold.
        owner: the rank that computes it.
        parts: its slots, one tuple for each virtual replica that it covers (more than one only in `TOTAL`).
            Each part is a left fold over its slots, and the term a left fold over its parts.
        kind: what it covers.
    """

    index: int
    owner: int
    parts: tuple[tuple[int, ...], ...]
    kind: TermKind

    @property
    def slots(self) -> tuple[int, ...]:
        """All slots of the term, in the order in which they are added."""
        return tuple(slot for part in self.parts for slot in part)


@dataclass(frozen=True)
class Fold:
    """The sum of one step.

    Attributes:
        terms: every term, in order.
        groups: indices of terms. The terms of a group are folded first; the sum is a left fold over the
            groups. A group is one virtual replica, or the replicas that a `TOTAL` term covers.
    """

    terms: tuple[Term, ...]
    groups: tuple[tuple[int, ...], ...]

    def owned_by(self, rank: int) -> tuple[Term, ...]:
        """The terms that `rank` computes, in order."""
        return tuple(term for term in self.terms if term.owner == rank)

    def evaluate(self, values: Sequence[T], add: Callable[[T, T], T]) -> T:
        """Combine the terms' values; what a chunk's owner does with tensors, in one expression."""
        return reduce(add, (reduce(add, (values[index] for index in group)) for group in self.groups))


def blocks(slots: int, replicas: int) -> tuple[tuple[int, ...], ...]:
    """The contiguous slots of each virtual replica; sizes differ by at most one, the larger ones first.

    Raises:
        ValueError: unless `1 <= replicas <= slots`.
    """
    if not 1 <= replicas <= slots:
        raise ValueError(f"{slots} slots cannot be divided among {replicas} virtual replicas")
    size, larger = divmod(slots, replicas)
    starts = [v * size + min(v, larger) for v in range(replicas + 1)]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts))


def plan_fold(owners: Sequence[int], replicas: int, empty: Iterable[int] = (), *, merge: bool = True) -> Fold:
    """Divide the sum of a step into the fewest terms that keep every addition.

    Args:
        owners: the rank that computes each slot.
        replicas: V, the number of virtual replicas.
        empty: slots without samples; they are left out of the sum, and so is a replica of empty slots only.
        merge: whether whole replicas that follow one another from the first on may be one term.

    Returns:
        The fold; without any term if every slot is empty.
    """
    absent = frozenset(empty)
    stretches: list[tuple[TermKind, int, list[tuple[int, ...]]]] = []
    groups: list[list[int]] = []
    for block in blocks(len(owners), replicas):
        slots = tuple(slot for slot in block if slot not in absent)
        if not slots:
            continue
        owner = owners[slots[0]]
        # Addition is not associative: only a run that begins a replica is a partial result of its fold.
        length = next((i for i, slot in enumerate(slots) if owners[slot] != owner), len(slots))
        prefix, rest = slots[:length], slots[length:]
        if merge and not rest and _extends_total(stretches, owner):
            stretches[0][2].append(prefix)
            continue
        kind = TermKind.TOTAL if not rest and not stretches else TermKind.PREFIX
        groups.append([len(stretches)])
        stretches.append((kind, owner, [prefix]))
        for slot in rest:
            groups[-1].append(len(stretches))
            stretches.append((TermKind.SINGLE, owners[slot], [(slot,)]))
    terms = (Term(i, owner, tuple(parts), kind) for i, (kind, owner, parts) in enumerate(stretches))
    return Fold(tuple(terms), tuple(tuple(group) for group in groups))


def plan_shares(owners: Sequence[int], empty: Iterable[int] = ()) -> Fold:
    """One term for each rank, whatever its slots: the least to send, but the bits depend on the owners."""
    absent = frozenset(empty)
    shares: dict[int, list[int]] = {owner: [] for owner in sorted(owners)}
    for slot, owner in enumerate(owners):
        if slot not in absent:
            shares[owner].append(slot)
    filled = [(owner, tuple(slots)) for owner, slots in shares.items() if slots]
    terms = tuple(Term(i, owner, (slots,), TermKind.SHARE) for i, (owner, slots) in enumerate(filled))
    return Fold(terms, tuple((term.index,) for term in terms))


def _extends_total(stretches: Sequence[tuple[TermKind, int, object]], owner: int) -> bool:
    """Whether a whole replica of `owner` continues the running total, and nothing came between."""
    return len(stretches) == 1 and stretches[0][0] is TermKind.TOTAL and stretches[0][1] == owner
