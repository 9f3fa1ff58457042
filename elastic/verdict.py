"""The one word at the end of a step: commit, skip, or do it again; with what everybody has to know by then.

Every worker casts one vote, a short vector of integers, and one exchange takes the maximum of each element.
What must be equal travels twice, as itself and as its complement: the two maxima fit together only if all
were equal. Everybody sees the same maxima and comes to the same outcome without asking again. The file must
never carry anything whose size depends on the data, and must never decide from what only this worker knows.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from elastic.errors import CollectiveAborted, ConfigError
from elastic.group import Group
from elastic.snapshots import Ballot

_DIRECT_SIZE_MAX = 8
"""Up to here everybody sends to everybody, which takes the time of one message."""

_TAG = 1 << 28
"""Above every tag of a reduction."""

_EQUAL = {
    "step": "the step",
    "generation": "the generation",
    "groups_hash": "the optimizers' settings (learning rates, weight decay, ...): derive them from what all workers know alike",
    "measures_hash": "what is measured: call session.mean() with the same names in the same order on every worker (NaN is as "
    "good as no value), and session.weight() in every slot or in none",
}

_HEAD = 8
"""Values of a vote besides what must be equal and the parameters' presence."""


class VoteMismatch(ConfigError):
    """Workers that should do the same do not: the program differs between them; change it and start again."""


class Decision(enum.Enum):
    """What happens to the step."""

    COMMIT = "commit"
    SKIP = "skip"
    """Some gradient is not finite: the step advances, without an update."""
    RETRY = "retry"
    """Some worker's gradients are not all in the sum: reduce again, the step stays."""


@dataclass(frozen=True)
class Vote:
    """What one worker knows at the end of a step.

    Attributes:
        step: the step that was reduced.
        generation: the world that reduced it.
        complete: whether the gradients of all slots of this worker are in the sum.
        finite: whether this worker's chunks of the sum are.
        groups_hash: of the optimizer's param groups, a signed 64-bit integer.
        measures_hash: of the names of what is measured, a signed 64-bit integer.
        next_generation: the newest generation that this worker is ready to switch to.
        stop: whether this worker was asked to stop after this step.
        presence: for each parameter, whether a slot of this worker gave it a gradient.
        snapshots: what this worker says of them.
    """

    step: int
    generation: int
    complete: bool
    finite: bool
    groups_hash: int
    next_generation: int
    stop: bool
    presence: Sequence[bool] = ()
    measures_hash: int = 0
    snapshots: Ballot = field(default_factory=Ballot)


@dataclass(frozen=True)
class Outcome:
    """What everybody knows after the exchange; the same on every rank.

    Attributes:
        decision: what happens to the step.
        reason: why, in words.
        next_generation: the newest generation that all are ready to switch to.
        stop: whether anybody was asked to stop.
        presence: for each parameter, whether any slot gave it a gradient.
        snapshots: what all together say of them.
    """

    decision: Decision
    reason: str
    next_generation: int
    stop: bool
    presence: list[bool]
    snapshots: Ballot = field(default_factory=Ballot)


def cast(group: Group, vote: Vote, voted: Callable[[], None] | None = None) -> Outcome:
    """Exchange the votes of all ranks; the call returns everywhere or fails somewhere.

    A rank votes when it has received all that was posted to it, so this settles the group, too. `voted` is called when this
    rank's vote is on its way and nothing has come from others.

    Raises:
        VoteMismatch: step, generation or hash of the param groups are not the same everywhere.
        CollectiveAborted: a peer is gone. Others may have the outcome; whoever voted can still commit.
    """
    posted = group.posted
    outcome = _read(_maximum(group, _pack(vote), voted or _ignore), vote)
    group.forget_posted(posted)
    return outcome


def _pack(vote: Vote) -> torch.Tensor:
    # The complement reverses the order like a minus sign, but has no value that it overflows on.
    equal = [vote.step, vote.generation, vote.groups_hash, vote.measures_hash]
    ballot = vote.snapshots
    flags = [not vote.complete, not vote.finite, vote.stop, not ballot.captures, ballot.missed, ballot.stable]
    head = [*equal, *(~value for value in equal), ~vote.next_generation, ~ballot.protected, *flags]
    return torch.tensor([*head, *vote.presence], dtype=torch.int64)


def _read(maxima: torch.Tensor, vote: Vote) -> Outcome:
    values = maxima.tolist()
    count = len(_EQUAL)
    highest, lowest = values[:count], [~value for value in values[count : 2 * count]]
    differing = [words for words, low, high in zip(_EQUAL.values(), lowest, highest, strict=True) if low != high]
    if differing:
        raise VoteMismatch(f"the workers of generation {vote.generation} do not agree on {'; nor on '.join(differing)}")
    next_generation, protected, incomplete, not_finite, stop, spared, missed, stable = values[2 * count : 2 * count + _HEAD]
    if incomplete:
        decision, reason = Decision.RETRY, "gradients of a worker are missing from the sum"
    elif not_finite:
        decision, reason = Decision.SKIP, "a gradient is not finite"
    else:
        decision, reason = Decision.COMMIT, "all gradients are summed and finite"
    presence = [bool(value) for value in values[2 * count + _HEAD :]]
    ballot = Ballot(~protected, not spared, bool(missed), stable)
    return Outcome(decision, reason, ~next_generation, bool(stop), presence, ballot)


def _ignore() -> None:
    pass


def _maximum(group: Group, vector: torch.Tensor, voted: Callable[[], None]) -> torch.Tensor:
    if group.size > _DIRECT_SIZE_MAX:
        return _maximum_in_rounds(group, vector, voted)
    rows = torch.empty(group.size, vector.numel(), dtype=vector.dtype)
    rows[group.rank] = vector
    with _drained(group):
        works = [group.take(rows[peer], peer, _TAG) for peer in group.peers]
        for peer in group.peers:
            group.post(vector, peer, _TAG)
        voted()
        for work in works:
            work.wait()
    return rows.amax(0)


def _maximum_in_rounds(group: Group, vector: torch.Tensor, voted: Callable[[], None]) -> torch.Tensor:
    """Dissemination: the distance doubles, and a maximum does not mind what it has seen before."""
    with _drained(group):
        for number in range((group.size - 1).bit_length()):
            received = torch.empty_like(vector)
            work = group.take(received, (group.rank - 2**number) % group.size, _TAG + number)
            group.post(vector, (group.rank + 2**number) % group.size, _TAG + number)
            voted()
            work.wait()
            vector = torch.maximum(vector, received)  # a new one: the old one may still be on its way
    return vector


@contextlib.contextmanager
def _drained(group: Group) -> Iterator[None]:
    """After a failure nothing may write into our memory any more."""
    try:
        yield
    except CollectiveAborted:
        group.drain()
        raise
