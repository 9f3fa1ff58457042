"""Where the state comes from when no worker that holds it lives: memory, parity, a checkpoint, or nowhere.

One pure decision, cheapest exact rung first, and the newest state first: a snapshot counts only if every slice of it can be
had, whole from a node that is here or decoded from the blocks of its protection group. Slices of different snapshots are
never mixed, nothing is approximated, and the reason says in words what was passed over and what the choice costs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum

from elastic.snapshots import SnapshotId
from recovery.placement import ProtectionGroup

NAMES_MAX = 8
REASONS_MAX = 3
"""So many nodes are named in one sentence, and so many groups or snapshots told of; of the rest, the number is said."""


class Rung(StrEnum):
    """Rungs of the ladder, cheapest first."""

    LIVE_REPLICA = "live replica"
    OWN_SNAPSHOT = "own snapshot"
    ERASURE_DECODE = "erasure decode"
    NEIGHBOUR_AVERAGE = "neighbour average"
    CHECKPOINT = "checkpoint"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Holding:
    """What an agent that is here says it holds of one snapshot.

    Attributes:
        node: where.
        snapshot: of which.
        slices: indices of those it holds complete and intact, its workers' own as a rule.
        parity: whether all its parity blocks of that snapshot are complete.
    """

    node: str
    snapshot: SnapshotId
    slices: tuple[int, ...]
    parity: bool


@dataclass(frozen=True, slots=True)
class SnapshotWorld:
    """What the ledger knows of the world that captured a snapshot.

    Attributes:
        generation: its number.
        slices: (node, slice index) of every worker; a node's slices are its shard.
        groups: its protection groups; a node is in at most one.
    """

    generation: int
    slices: tuple[tuple[str, int], ...]
    groups: tuple[ProtectionGroup, ...]


@dataclass(frozen=True, slots=True)
class Restore:
    """The decision.

    Attributes:
        rung: where the state comes from.
        snapshot: which one is restored; None for a checkpoint and for STOP.
        sources: (slice index, node that holds it), in order; slices that must be decoded are absent.
        decoded: the nodes whose shards must be decoded, in order.
        reason: which rung, why none above it, what it costs.
    """

    rung: Rung
    snapshot: SnapshotId | None
    sources: tuple[tuple[int, str], ...]
    decoded: tuple[str, ...]
    reason: str


def choose_restore(
    holdings: Sequence[Holding],
    worlds: Sequence[SnapshotWorld],
    *,
    committed: int,
    checkpoint_step: int | None,
    refused: Collection[SnapshotId] = (),
) -> Restore:
    """Choose what a whole new world begins with.

    Args:
        holdings: of all nodes that are here.
        worlds: those whose snapshots may be restored; snapshots of other generations are passed over.
        committed: the newest step that anybody is known to have committed.
        checkpoint_step: of the newest durable checkpoint, None if there is none. A snapshot as new is preferred.
        refused: snapshots that nobody could restore although they seemed to be there: taken only where there is nothing else.
    """
    known = {world.generation: world for world in worlds}
    passed_over: list[str] = []

    def because(*chosen: str) -> str:
        return " ".join(
            ["No live replica holds the state.", *_first(passed_over, "snapshots are passed over."), *chosen]
        )

    snapshots = sorted({holding.snapshot for holding in holdings}, reverse=True)
    for snapshot in snapshots:
        if checkpoint_step is not None and snapshot.step < checkpoint_step:
            passed_over.append(f"{_called(snapshot)} is older than the checkpoint.")
            break
        if snapshot.generation not in known:
            passed_over.append(f"{_called(snapshot)} is of a world that the ledger does not offer.")
            continue
        if snapshot in refused:
            passed_over.append(f"{_called(snapshot)} was refused by every node before.")
            continue
        found = _look_for(snapshot, known[snapshot.generation], holdings)
        if found.obstacles:
            obstacles = "; ".join(_first(found.obstacles, "protection groups are no better"))
            passed_over.append(f"{_called(snapshot)} cannot be had: {obstacles}.")
            continue
        rung = Rung.ERASURE_DECODE if found.decoded else Rung.OWN_SNAPSHOT
        reason = because(f"{_called(snapshot)} is restored: {found.how}.", _cost(committed - snapshot.step))
        return Restore(rung, snapshot, found.sources, found.decoded, reason)
    if not snapshots:
        passed_over.append("No node that is here holds a snapshot.")
    if checkpoint_step is not None:
        reason = because(f"The checkpoint of step {checkpoint_step} is read.", _cost(committed - checkpoint_step))
        return Restore(Rung.CHECKPOINT, None, (), (), reason)
    if any(snapshot in refused for snapshot in snapshots):
        return choose_restore(holdings, worlds, committed=committed, checkpoint_step=None)
    reason = because(f"There is no checkpoint: the state after step {committed} is lost, and the job stops.")
    return Restore(Rung.STOP, None, (), (), reason)


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is of one snapshot; obstacles, in words, where that is not enough."""

    sources: tuple[tuple[int, str], ...]
    decoded: tuple[str, ...]
    how: str
    obstacles: tuple[str, ...]


def _look_for(snapshot: SnapshotId, world: SnapshotWorld, holdings: Sequence[Holding]) -> _Found:
    held: dict[str, set[int]] = {}
    with_parity = set()
    for holding in holdings:
        if holding.snapshot == snapshot:
            held.setdefault(holding.node, set()).update(holding.slices)
            if holding.parity:
                with_parity.add(holding.node)
    anywhere = {index: node for node in sorted(held, reverse=True) for index in held[node]}
    shards: dict[str, set[int]] = {}
    sources = {}
    for owner, index in world.slices:
        shards.setdefault(owner, set()).add(index)
        if index in anywhere:
            sources[index] = owner if index in held.get(owner, ()) else anywhere[index]
    decoded = tuple(sorted(node for node, indices in shards.items() if not indices <= sources.keys()))
    # A block is a piece of the whole shard, so a node that lacks one slice can give none of its blocks.
    with_shard = {node for node in held if shards.get(node, set()) <= held[node]}
    others = {holding.node for holding in holdings} - held.keys()

    obstacles, codes, unprotected = [], set(), set(decoded)
    for group in world.groups:
        if unprotected.isdisjoint(group.nodes):
            continue
        lacking = _lacking(group, unprotected, with_shard, with_parity)
        if len(lacking) > group.m:
            obstacles.append(
                f"{_state_of(lacking, held.keys(), others)}, "
                f"{len(lacking) - group.m} more than the {group.m} of {len(group.nodes)} that the protection group survives"
            )
        codes.add(f"({group.k},{group.m})")
        unprotected.difference_update(group.nodes)
    if unprotected:
        obstacles.append(
            f"{_state_of(sorted(unprotected), held.keys(), others)}, and no protection group has parity of it"
        )

    how = "every slice is in the memory of a node that is here"
    if decoded:
        code = " and ".join(sorted(codes))
        how = (
            f"{_state_of(decoded, held.keys(), others)}; what is missing is decoded with {code}, k bytes read for each"
        )
    return _Found(tuple(sorted(sources.items())), decoded, how, tuple(obstacles))


def _lacking(
    group: ProtectionGroup, wanted: AbstractSet[str], with_shard: AbstractSet[str], with_parity: AbstractSet[str]
) -> tuple[str, ...]:
    """The nodes that cannot give their block, in the worst of the stripes that hold data of a wanted node."""
    worst: tuple[str, ...] = ()
    for stripe in group.stripes():
        owners = [owner for owner, _ in stripe.data]
        if not wanted.isdisjoint(owners):
            lacking = [owner for owner in owners if owner not in with_shard]
            lacking += [holder for holder in stripe.parity if holder not in with_parity]
            worst = max(worst, tuple(sorted(lacking)), key=len)
    return worst


def _called(snapshot: SnapshotId) -> str:
    return f"The snapshot of step {snapshot.step} (generation {snapshot.generation})"


def _state_of(nodes: Sequence[str], held: AbstractSet[str], others: AbstractSet[str]) -> str:
    """What is wrong with these nodes: all of it is lost, or they are among the `others` that hold no part, or have one."""
    kinds = (
        ("is lost", "are lost", [node for node in nodes if node not in held and node not in others]),
        ("holds nothing of it", "hold nothing of it", [node for node in nodes if node in others]),
        ("holds only a part", "hold only a part", [node for node in nodes if node in held]),
    )
    return " and ".join(f"{_listed(some)} {one if len(some) == 1 else many}" for one, many, some in kinds if some)


def _listed(nodes: Sequence[str]) -> str:
    if len(nodes) > NAMES_MAX:
        return f"{', '.join(nodes[:NAMES_MAX])} and {len(nodes) - NAMES_MAX} more"
    return ", ".join(nodes)


def _first(said: Sequence[str], rest: str) -> list[str]:
    more = len(said) - REASONS_MAX
    return [*said[:REASONS_MAX], f"{more} more {rest}"] if more > 0 else list(said)


def _cost(steps: int) -> str:
    if steps <= 0:
        return "No committed step is redone."
    return f"{steps} committed step{' is' if steps == 1 else 's are'} redone."
