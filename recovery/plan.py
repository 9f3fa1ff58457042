"""Make the plan of a generation: members in order of rank, the owner of each slot, the store's place, the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic.domain import Blend, LayerPath, Member, Plan, PlanKind, PlanNode, Rebuilt
from elastic.pipeline.moves import moves
from recovery.dealing import deal_afresh, deal_orphans
from recovery.pipelines import Layout
from recovery.placement import ProtectionGroup, Site, make_groups, warnings


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may be a member: where it runs and how its peers reach it."""

    worker: str
    node: str
    local_rank: int
    address: str
    store_address: str  # HOST:PORT of its agent's peer service


def make_plan(
    *,
    generation: int,
    kind: PlanKind,
    members: Sequence[Candidate],
    slots: int,
    virtual_replicas: int,
    prepare_timeout_ms: int,
    reason: str,
    before: Plan | None = None,
    nodes: Sequence[PlanNode] = (),
    redundancy: tuple[int, int] = (0, 0),
    layout: Layout | None = None,
    blends: Sequence[Blend] | None = None,
    rebuilt: Sequence[Rebuilt] = (),
) -> Plan:
    """Return the plan of a world with these members, ranks in the order given.

    `before` is the world that is continued; the owners of one that a FENCE continues keep their slots, since they may have
    finished some of the interrupted step. All other worlds begin at a boundary and are dealt afresh. `layout` is how a
    pipeline is cut, `blends` how lost layers of it are made from others (None: no stage is lost), `rebuilt` which were not
    long ago. `nodes` are those of the members, and `redundancy` the data and parity shards that snapshots of this world are
    protected with; none if there are too few nodes for it. With more members than slots some have none of their own, as the
    workers of an island. Raises ValueError without members, which the caller must have prevented.
    """
    if not members:
        raise ValueError("a world needs at least one member")
    names = [candidate.worker for candidate in members]
    if layout is not None:
        owners: Sequence[str] = [names[rank] for rank in layout.owners]
    elif kind is PlanKind.FENCE and before is not None:
        owners = deal_orphans([before.members[rank].worker for rank in before.owners], names)
    else:
        owners = deal_afresh(slots, virtual_replicas, names)
    data_shards, parity_shards = redundancy
    is_protected = 0 < parity_shards < len(nodes)
    rank_of = {name: rank for rank, name in enumerate(names)}
    plan = Plan(
        generation=generation,
        kind=kind,
        members=tuple(
            Member(
                worker=candidate.worker,
                node=candidate.node,
                rank=rank_of[candidate.worker],
                local_rank=candidate.local_rank,
                address=candidate.address,
            )
            for candidate in members
        ),
        owners=tuple(rank_of[owner] for owner in owners),
        virtual_replicas=virtual_replicas,
        store_node=members[0].node,
        store_address=members[0].store_address,
        prepare_timeout_ms=prepare_timeout_ms,
        reason=reason,
        nodes=tuple(nodes),
        data_shards=data_shards if is_protected else 0,
        parity_shards=parity_shards if is_protected else 0,
    )
    if layout is None:
        return plan
    plan = replace(
        plan,
        stages=layout.stages,
        routes=layout.flat_routes,
        paths=tuple(LayerPath(path) for path in layout.ways.paths),
        path_of=layout.ways.path_of,
        copies=layout.copies,
        predicted_s=layout.prediction.step_s,
        reason=f"{reason}; {layout.reason}",
        blends=tuple(blends or ()),
        rebuilt=tuple(rebuilt),
    )
    if before is None or (blends is None and kind is not PlanKind.SWITCH):
        return plan
    return replace(plan, moves=moves(before, plan, is_loss=blends is not None))


def protection_groups(plan: Plan) -> tuple[ProtectionGroup, ...]:
    """Return the groups whose nodes protect the snapshots of a world; none where nothing is protected."""
    return make_groups(_sites(plan), plan.data_shards, plan.parity_shards) if plan.parity_shards else ()


def protection_gaps(plan: Plan, data_shards: int, parity_shards: int) -> tuple[str, ...]:
    """Return in what the protection of a world falls short of the code that was asked for, a sentence each."""
    return warnings(_sites(plan), data_shards, parity_shards) if parity_shards else ()


def _sites(plan: Plan) -> list[Site]:
    return [Site(node.node, node.domain) for node in plan.nodes]
