"""Decide how a pipeline is cut: which layers and which workers make up each stage, and every slot's way through them.

After a loss that leaves each stage a worker, nothing moves: slots are re-routed to the others of the stage, or re-dealt to the
replicas that are whole, or by speed, whichever the simulator finds faster. Otherwise candidates (the best cut, one nearly as
good that moves least, one that a slot passes soonest, the present one) are run in the simulator, and the fastest is taken; of
two that are as fast, the one that moves fewer bytes. What does not fit, also while layers are on their way, is no candidate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from elastic.domain import LayerCopy, LayerProfile, Plan, Stage
from elastic.pipeline.actions import Schedule, in_flight_max, make_actions
from recovery.dealing import deal_afresh, deal_by_speed
from recovery.partition import Costs, Cuts, StageRoom, partition
from recovery.simulation import Link, Prediction, simulate

NEARLY = 0.02
"""By how much a plan may be slower than the best one, if it moves fewer bytes."""
SOONER = 0.10
"""By how much the slowest stage of a candidate may be slower, if a slot passes all of them sooner."""
LATER = 0.05
"""By how much more a layer counts in each later stage: of cuts that a slot passes as soon, short last stages are faster."""
LEAST = 0.2
"""So much of an average stage a slow worker keeps for that, at least: of one that computes next to nothing no speed is known."""
WIDTHS_MAX = 8
"""So many ways of giving some stages one worker more than others are tried."""
FINALISTS = 6
"""So many candidates, those with the fastest slowest stage first, are run in the simulator."""


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways of the slots through the layers (`recovery/ways.py`); none: all go straight.

    Attributes:
        paths: different ones, each the layers in order. path_of: for each slot the number of its path.
        copies_ends: whether what is at the ends and has no partner is kept in duplicate by the stages next to them.
    """

    paths: tuple[tuple[int, ...], ...] = ()
    path_of: tuple[int, ...] = ()
    copies_ends: bool = False

    @property
    def of_slots(self) -> tuple[tuple[int, ...], ...]:
        """The path of each slot."""
        return tuple(self.paths[number] for number in self.path_of)

    @property
    def partners(self) -> dict[int, int]:
        """For each layer that changes places with another in some slots, that other one."""
        orders = (path for path in self.paths if sorted(path) == list(range(len(path))))
        swapped = ({layer: other for layer, other in enumerate(path) if layer != other} for path in orders)
        return next((each for each in swapped if each), {})

    def shares(self, layers: int) -> list[float]:
        """For each layer the share of the slots that pass it."""
        if not self.path_of:
            return [1.0] * layers
        counts = [0] * layers
        for path in self.of_slots:
            for layer in path:
                counts[layer] += 1
        return [count / len(self.path_of) for count in counts]


@dataclass(frozen=True, slots=True)
class Model:
    """What is to be cut.

    Attributes:
        layers: what each costs. slots, virtual_replicas: of a step. stages: how many were asked for; 0: one for each worker.
        memory_bytes: of a worker; 0: enough. ways: of the slots.
    """

    layers: tuple[LayerProfile, ...]
    slots: int
    virtual_replicas: int = 1
    stages: int = 0
    memory_bytes: int = 0
    schedule: Schedule = Schedule.ONE_F_ONE_B
    link: Link = field(default_factory=Link)
    ways: Ways = field(default_factory=Ways)

    @property
    def costs(self) -> Costs:
        """Sums over runs of layers: seconds of an average slot."""
        return Costs(self.layers, self.ways.shares(len(self.layers)))


@dataclass(frozen=True, slots=True)
class Layout:
    """How a pipeline is cut.

    Attributes:
        stages: with their ranks. routes: of each slot, the rank at each stage. prediction: what a step takes.
        moved_bytes: of state that has to go to another worker first. reason: in words.
        dealing: how slots are dealt, in words; "" for evenly within each stage. ways: of the slots through the layers.
        copies: layers that ranks of other stages keep up with.
    """

    stages: tuple[Stage, ...]
    routes: tuple[tuple[int, ...], ...]
    prediction: Prediction
    moved_bytes: int
    reason: str
    dealing: str = ""
    ways: Ways = field(default_factory=Ways)
    copies: tuple[LayerCopy, ...] = ()

    @property
    def cuts(self) -> Cuts:
        """Where the stages begin and end."""
        return (0, *(stage.last for stage in self.stages))

    @property
    def flat_routes(self) -> tuple[int, ...]:
        """The routes as a plan has them."""
        return tuple(itertools.chain.from_iterable(self.routes))

    @property
    def owners(self) -> tuple[int, ...]:
        """For each slot the rank that computes its loss."""
        return tuple(route[-1] for route in self.routes)


@dataclass(frozen=True, slots=True)
class NoLayout:
    """A pipeline cannot be cut.

    Attributes:
        reason: in words. is_final: whether no number of workers would help.
    """

    reason: str
    is_final: bool = False


Held = Mapping[int, range]
"""The layers that a rank holds already."""


def lay_out(
    model: Model, ranks: int, held: Held | None = None, speeds: Mapping[int, float] | None = None
) -> Layout | NoLayout:
    """Return the best layout for so many workers, or why there is none.

    Args:
        model: to cut. ranks: how many workers. held: what they hold already, which is better not moved; None: nothing does.
        speeds: of each rank, 1.0 where there is none.
    """
    candidates, too_large = candidates_for(model, ranks, held, speeds)
    if not candidates:
        if too_large:
            return NoLayout(f"{too_large[0]}: more workers are needed")
        return _why_not(model, stages_for(model, ranks))
    return best_of(candidates)


def stages_for(model: Model, workers: int) -> int:
    """How many stages the model is cut into for so many workers."""
    return min(model.stages or workers, workers, len(model.layers))


def best_of(candidates: Sequence[Layout]) -> Layout:
    """Return the fastest; of those that are nearly as fast, the one that moves the fewest bytes."""
    fastest = min(layout.prediction.step_s for layout in candidates)
    near = [layout for layout in candidates if layout.prediction.step_s <= fastest * (1 + NEARLY)]
    return min(near, key=lambda layout: (layout.moved_bytes, layout.prediction.step_s, layout.cuts))


def candidates_for(
    model: Model, ranks: int, held: Held | None = None, speeds: Mapping[int, float] | None = None
) -> tuple[list[Layout], list[str]]:
    """Return the layouts among which `lay_out` chooses, and in words what was too large. Arguments as there."""
    held, speeds = held or {}, speeds or {}
    count = stages_for(model, ranks)
    costs = model.costs
    candidates: list[Layout] = []
    too_large: list[str] = []
    found: list[tuple[float, Cuts, tuple[tuple[int, ...], ...]]] = []
    for widths in _widths(ranks, count):
        members = _seated(model, costs, widths, held, ranks)
        rooms = _rooms(model, widths, members, speeds)
        for cuts in _cuts(costs, rooms, members, held):
            pairs = zip(itertools.pairwise(cuts), rooms, strict=True)
            slowest = max(costs.seconds(first, last) / room.power for (first, last), room in pairs)
            found.append((slowest, cuts, members))
    found.sort(key=lambda each: each[0])
    for _, cuts, members in found:
        layout = _evaluated(model, cuts, members, held, speeds)
        fault = _too_large(model, layout, held)
        if fault and layout.copies:  # rather without duplicates than not at all
            layout = replace(layout, copies=())
            fault = _too_large(model, layout, held)
        if fault:
            too_large.append(fault)
        else:
            candidates.append(layout)
        if len(candidates) == FINALISTS:
            break
    return candidates, too_large


def rerouted(model: Model, stages: Sequence[Stage], reason: str, speeds: Mapping[int, float] | None = None) -> Layout:
    """Return the layout that keeps these stages, with the slots dealt anew among the ranks of each."""
    layout = _routed(model, tuple(stages), {}, speeds or {})
    return replace(layout, moved_bytes=0, reason=f"{reason}; {describe(layout)}")


def describe(layout: Layout) -> str:
    """Return a layout in words."""
    stages = ", ".join(
        f"{s.first}-{s.last - 1}" + (f" x{len(s.ranks)}" if len(s.ranks) > 1 else "") for s in layout.stages
    )
    busiest = max(layout.prediction.busy_s)
    share = 100 * layout.prediction.bubble
    return (
        f"{len(layout.stages)} stage(s) of layers {stages}: {1000 * layout.prediction.step_s:.1f} ms a step expected, of which "
        f"the busiest worker computes {1000 * busiest:.1f} ms and all wait {share:.0f} % of the time"
        + (f"; {layout.dealing}" if layout.dealing else "")
        + (f"; {ways}" if (ways := _in_words(layout)) else "")
    )


def _in_words(layout: Layout) -> str:
    """What is unusual in the ways of the slots; "" if they go straight."""
    partners = sorted((layer, other) for layer, other in layout.ways.partners.items() if layer < other)
    if partners:
        copied = ", ".join(str(n) for copy in layout.copies for n in range(copy.first, copy.last))
        swapped = ", ".join(f"{layer} with {other}" for layer, other in partners)
        return f"half of the slots swap layers {swapped}" + (f"; {copied} are kept in duplicate" if copied else "")
    if layout.ways.path_of:
        count = layout.stages[-1].last
        left_out = count - sum(layout.ways.shares(count))
        return f"each slot passes {left_out:.0f} of {count} layers by"
    return ""


def _widths(ranks: int, count: int) -> list[tuple[int, ...]]:
    """How many workers each stage gets: as equal as possible, and every way of giving some one more, up to a number."""
    base, more = divmod(ranks, count)
    if math.comb(count, more) <= WIDTHS_MAX:
        chosen = list(itertools.combinations(range(count), more))
    else:  # runs of neighbours, each beginning further back
        begins = range(0, count, max(1, count // WIDTHS_MAX))
        chosen = [tuple((begin + number) % count for number in range(more)) for begin in begins]
    return [tuple(base + (number in wide) for number in range(count)) for wide in chosen]


def _seated(model: Model, costs: Costs, widths: Sequence[int], held: Held, ranks: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of each stage: where they hold most of what the best cut would put there; newcomers fill what is left.

    Stages take turns in getting newcomers, so that workers of one node are in different ones.
    """
    seats: list[list[int]] = [[] for _ in widths]
    cuts = partition(costs, [StageRoom(width) for width in widths]) if held else None
    if cuts is not None:
        runs = [range(first, last) for first, last in itertools.pairwise(cuts)]

        def fit(rank: int, number: int) -> tuple[float, float, int]:
            mine, theirs = held[rank], runs[number]
            first, last = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
            shared = costs.state_bytes(first, last) if first < last else 0.0
            return -shared, abs(mine.start + mine.stop - theirs.start - theirs.stop), number

        for rank in sorted(held, key=lambda rank: (held[rank].start, held[rank].stop, rank)):
            free = [number for number in range(len(widths)) if len(seats[number]) < widths[number]]
            seats[min(free, key=lambda number: fit(rank, number))].append(rank)
    turn = itertools.cycle(range(len(widths)))
    for rank in (rank for rank in range(ranks) if rank not in held):
        number = next(n for n in turn if len(seats[n]) < widths[n])
        seats[number].append(rank)
    return tuple(tuple(sorted(members)) for members in seats)


def _rooms(
    model: Model, widths: Sequence[int], members: Sequence[Sequence[int]], speeds: Mapping[int, float]
) -> list[StageRoom]:
    stages = [Stage(number, number + 1, tuple(ranks)) for number, ranks in enumerate(members)]
    return [
        StageRoom(
            sum(speeds.get(rank, 1.0) for rank in ranks),
            model.memory_bytes,
            min(in_flight_max(stages, number, model.schedule), -(-model.slots // widths[number])),
        )
        for number, ranks in enumerate(members)
    ]


def _cuts(costs: Costs, rooms: Sequence[StageRoom], members: Sequence[Sequence[int]], held: Held) -> list[Cuts]:
    def moved(number: int, first: int, last: int) -> float:
        return sum(
            costs.state_bytes(layer, layer + 1)
            for rank in members[number]
            for layer in range(first, last)
            if layer not in held.get(rank, range(0))
        )

    paces = [room.power / len(ranks) for room, ranks in zip(rooms, members, strict=True)]
    least_s = LEAST * costs.seconds(0, costs.count) / len(rooms)

    def passing(number: int, first: int, last: int) -> float:
        if costs.seconds(first, last) < least_s:
            return math.inf
        return costs.seconds(first, last) / paces[number] * (1 + LATER * number)

    best = partition(costs, rooms)
    if best is None:
        return []
    found = [best]
    if len(set(paces)) > 1:  # the fewer layers on the slow, the sooner the first slot is through, and the last one back
        soonest = partition(costs, rooms, passing, SOONER)
        found += [soonest] if soonest is not None else []
    if held:
        nearly = partition(costs, rooms, moved, NEARLY)
        present = _present(members, held, costs.count)
        found += [cuts for cuts in (nearly, present) if cuts is not None]
    return list(dict.fromkeys(found))


def _present(members: Sequence[Sequence[int]], held: Held, layers: int) -> Cuts | None:
    """The cuts that there are, if each stage's workers hold the same and together everything."""
    cuts = [0]
    for ranks in members:
        runs = {held.get(rank, range(0)) for rank in ranks if rank in held}
        if len(runs) != 1 or next(iter(runs)).start != cuts[-1]:
            return None
        cuts.append(next(iter(runs)).stop)
    return tuple(cuts) if cuts[-1] == layers else None


def _evaluated(
    model: Model, cuts: Cuts, members: Sequence[tuple[int, ...]], held: Held, speeds: Mapping[int, float]
) -> Layout:
    stages = tuple(
        Stage(first, last, ranks) for (first, last), ranks in zip(itertools.pairwise(cuts), members, strict=True)
    )
    return _routed(model, stages, held, speeds)


def as_it_is(
    model: Model, stages: Sequence[Stage], routes: Sequence[tuple[int, ...]], speeds: Mapping[int, float]
) -> Prediction:
    """Return what a step takes on a layout that there is."""
    paths = model.ways.of_slots
    actions = make_actions(stages, routes, model.schedule, (), paths)
    return simulate(stages, actions, model.layers, speeds=speeds, link=model.link, paths=paths)


def _routed(model: Model, stages: tuple[Stage, ...], held: Held, speeds: Mapping[int, float]) -> Layout:
    """The layout with the slots dealt in the fastest way; evenly, if that is nearly as fast."""
    even, *others = [(*way, as_it_is(model, stages, way[1], speeds)) for way in _ways(model, stages, speeds)]
    fastest = min(others, key=lambda way: way[2].step_s, default=even)
    dealing, routes, prediction = fastest if fastest[2].step_s * (1 + NEARLY) < even[2].step_s else even
    moved = sum(
        model.layers[layer].state_bytes
        for stage in stages
        for rank in stage.ranks
        for layer in range(stage.first, stage.last)
        if held and layer not in held.get(rank, range(0))
    )
    copies = copies_of(model.layers, stages, model.ways.partners) if model.ways.copies_ends else ()
    layout = Layout(stages, routes, prediction, moved, "", dealing, model.ways, copies)
    reason = describe(layout) + (f"; {moved / 2**20:.1f} MiB of state move" if held else "")
    return replace(layout, reason=reason)


def copies_of(
    layers: Sequence[LayerProfile], stages: Sequence[Stage], partners: Mapping[int, int]
) -> tuple[LayerCopy, ...]:
    """Return the layers of the first and the last stage that have no partner in another one, and who keeps up with them.

    It does so by their gradients, so that layers with buffers that training changes are left out.
    """
    if len(stages) < 2:
        return ()
    found = []
    for stage, neighbour in ((stages[0], stages[1]), (stages[-1], stages[-2])):
        for number in range(stage.first, stage.last):
            has_partner = not stage.first <= partners.get(number, number) < stage.last
            if layers[number].form and not layers[number].changes_buffers and not has_partner:
                found.append(LayerCopy(number, number + 1, neighbour.ranks))
    return tuple(found)


def _ways(
    model: Model, stages: Sequence[Stage], speeds: Mapping[int, float]
) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    """How slots may be dealt, in words, with the routes: evenly first, and whatever else might be faster."""
    ways = [("", [_dealt(model, stage.ranks) for stage in stages])]
    widths = [len(stage.ranks) for stage in stages]
    is_uneven = 1 < max(widths) != min(widths)
    paces = [{rank: speeds.get(rank, 1.0) for rank in stage.ranks} for stage in stages]
    differ = any(len(set(pace.values())) > 1 for pace in paces)
    if differ or is_uneven:
        words = "slots are dealt by speed" if differ else "slots are dealt in turns"
        ways.append((words, [deal_by_speed(model.slots, pace) for pace in paces]))
    if is_uneven:
        whole = [_dealt(model, stage.ranks[: min(widths)]) for stage in stages]
        ways.append((f"slots are dealt to {min(widths)} whole replica(s)", whole))
    return [(words, tuple(zip(*dealt, strict=True))) for words, dealt in ways]


def _dealt(model: Model, ranks: Sequence[int]) -> tuple[int, ...]:
    """The owner of each slot among the ranks of a stage."""
    return deal_afresh(model.slots, model.virtual_replicas, ranks)


def _too_large(model: Model, layout: Layout, held: Held) -> str:
    """In words, what does not fit: at rest, or while a worker has layers that come beside those that go."""
    if not model.memory_bytes:
        return ""
    known = {layer for layers in held.values() for layer in layers}
    for stage in layout.stages:
        for rank in stage.ranks:
            copied = [n for copy in layout.copies if rank in copy.ranks for n in range(copy.first, copy.last)]
            rest = layout.prediction.memory_bytes[rank] + sum(model.layers[n].state_bytes for n in copied)
            going = [layer for layer in held.get(rank, range(0)) if not stage.first <= layer < stage.last]
            if held and rank == min(held):  # leavers hand over to it what goes to newcomers alone
                going += [
                    layer
                    for other in layout.stages
                    for layer in range(other.first, other.last)
                    if layer not in known and not any(r in held for r in other.ranks)
                ]
            moving = rest + sum(model.layers[layer].state_bytes for layer in going)
            if moving > model.memory_bytes:
                while_moving = " while layers move" if rest <= model.memory_bytes else ""
                return (
                    f"layers {stage.first} to {stage.last - 1} need {_mib(moving)} MiB on one worker{while_moving}, and it has "
                    f"{_mib(model.memory_bytes)}"
                )
    return ""


def _why_not(model: Model, count: int) -> NoLayout:
    """Why no cut into so many stages fits."""
    costs = Costs(model.layers)
    for layer in range(len(model.layers)):
        needed = costs.memory_bytes(layer, layer + 1, 1)
        if model.memory_bytes and needed > model.memory_bytes:
            return NoLayout(
                f"layer {layer} needs {_mib(needed)} MiB with one slot's activations, and a worker has "
                f"{_mib(model.memory_bytes)}: it fits nowhere; split the layer, make slots smaller, or use recompute=True",
                is_final=True,
            )
    room = f"{count} stage(s) of workers with {_mib(model.memory_bytes)} MiB"
    most = min(model.stages or len(model.layers), len(model.layers))
    if count == most and partition(costs, [StageRoom(1.0, model.memory_bytes)] * most) is None:
        return NoLayout(f"{len(model.layers)} layers do not fit into {room}: ask for more stages", is_final=True)
    return NoLayout(f"{len(model.layers)} layers do not fit into {room}: more workers are needed")


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.4g}"


def held_in(plan: Plan, names: Sequence[str]) -> dict[int, range]:
    """What the members of a new world, in order of rank, hold of the world before."""
    held = {}
    for rank, name in enumerate(names):
        old = plan.rank_of(name)
        if old is not None:
            held[rank] = plan.layers_of(old)
    return held
