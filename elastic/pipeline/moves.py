"""Which layers have to go where when a pipeline is cut anew between two steps. A pure function of the two plans.

Over the old world's group leavers hand what nobody else has to those who stay (`handovers`); over the new one each layer
goes from all who hold it to all who are to hold it and do not (`moves`). Nothing else moves. Whoever keeps up with a layer of
another stage holds it as well as that stage does.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic.domain import LayerMove, Plan


def handovers(before: Plan, after: Plan) -> tuple[LayerMove, ...]:
    """Return what leavers give to one who stays, in ranks of the world before.

    It goes to a worker that is to hold the layer, if one such stays, otherwise to the first that stays.
    """
    staying = _staying(before, after)
    moves = []
    for stage in before.stages:
        if any(rank in staying for rank in stage.ranks):
            continue
        for layer in range(stage.first, stage.last):
            heirs = [old for old, new in staying.items() if layer in after.layers_of(new)]
            moves.append(LayerMove(layer, layer + 1, stage.ranks, (min(heirs or staying),)))
    return _joined(moves)


def moves(before: Plan, after: Plan, *, is_loss: bool = False) -> tuple[LayerMove, ...]:
    """Return what the members of the new world give to each other, in ranks of that world.

    After a loss those who are gone have handed over nothing, and layers that nobody has any more are in no move.
    """
    staying = _staying(before, after)
    holders: dict[int, set[int]] = {}
    for old, new in staying.items():
        for layer in before.held_by(old):
            holders.setdefault(layer, set()).add(new)
    for move in () if is_loss else handovers(before, after):
        for layer in range(move.first, move.last):
            holders.setdefault(layer, set()).update(staying[old] for old in move.targets)
    found = []
    for stage in after.stages:
        for layer in range(stage.first, stage.last):
            if is_loss and layer not in holders:
                continue
            targets = tuple(rank for rank in after.keepers_of(layer) if rank not in holders[layer])
            if targets:
                found.append(LayerMove(layer, layer + 1, tuple(sorted(holders[layer])), targets))
    return _joined(found)


def census(plan: Plan, layers: int) -> str:
    """Return "" if in a plan each layer is in one stage, each member in one, and each slot passes all; else what is wrong."""
    at = 0
    for number, stage in enumerate(plan.stages):
        if stage.first != at or stage.last <= stage.first or not stage.ranks:
            return f"stage {number} is {stage}, and should begin with layer {at} and have a layer and a rank"
        at = stage.last
    if at != layers:
        return f"the stages end with layer {at} of {layers}"
    ranks = sorted(rank for stage in plan.stages for rank in stage.ranks)
    if ranks != list(range(plan.world_size)):
        return f"ranks {ranks} are in stages, and 0 to {plan.world_size - 1} should be once each"
    for slot in range(plan.slots):
        pairs = zip(plan.route(slot), plan.stages, strict=True)
        if len(plan.route(slot)) != len(plan.stages) or any(rank not in stage.ranks for rank, stage in pairs):
            return f"slot {slot} goes by {plan.route(slot)}, which is no way through the stages"
    return ""


def fill(plan: Plan, without: Sequence[int]) -> tuple[LayerMove, ...]:
    """Return what goes to the ranks that hold nothing yet, from the others who are to hold the same."""
    found = []
    for layer in range(plan.stages[-1].last):
        keepers = plan.keepers_of(layer)
        targets = tuple(rank for rank in keepers if rank in without)
        if targets:
            found.append(LayerMove(layer, layer + 1, tuple(rank for rank in keepers if rank not in without), targets))
    return _joined(found)


def _staying(before: Plan, after: Plan) -> dict[int, int]:
    """Rank before -> rank after, of each worker that is in both."""
    ranks = {member.rank: after.rank_of(member.worker) for member in before.members}
    return {old: new for old, new in ranks.items() if new is not None}


def _joined(moves: Sequence[LayerMove]) -> tuple[LayerMove, ...]:
    """Layers that lie behind each other and go the same way, as one."""
    joined: list[LayerMove] = []
    for move in moves:
        last = joined[-1] if joined else None
        if last is not None and (last.last, last.sources, last.targets) == (move.first, move.sources, move.targets):
            joined[-1] = LayerMove(last.first, move.last, move.sources, move.targets)
        else:
            joined.append(move)
    return tuple(joined)
