"""Which way each slot takes through the layers of a pipeline, where not all go straight.

CheckFree+ (arXiv 2506.15461, section 4.2): every other slot passes the first blocks after as many that follow them, and the
last ones before as many that come before them, so that each learns the other's work; a lost one becomes a copy of its partner.

Partial pipelines (after SkipPipe, arXiv 2502.19913): every slot passes a share of the model by, never its ends. Which parts is
searched with the simulator of steps, so that slots are not in each other's way.

Ways are a function of what the layers are and of how many stages and slots there are, not of measured times, and are fixed with
a job's first world, in layers and not in stages: the same job has the same ways each time, and what is trained does not
depend on cuts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from elastic.domain import LayerProfile
from elastic.pipeline.paths import fault_of
from recovery.pipelines import Layout, Model, NoLayout, Ways, as_it_is, lay_out, stages_for

SKIPPED_MAX = 3
"""So many parts in a row may be passed by (SkipPipe jumps over no more)."""
PATTERNS_MAX = 24
"""So many ways of passing parts by are tried for a slot."""
ROUNDS_MAX = 3
BESIDE = 0.1
"""What an embedding or a head is taken to cost beside a block, while ways are chosen."""


def swapped_ways(model: Model, workers: int) -> Ways | NoLayout:
    """Return the ways of CheckFree+: every other slot passes the blocks at the ends in swapped order."""
    layers, blocks = model.layers, _blocks_of(model.layers)
    stages = stages_for(model, workers)
    if model.slots < 2:
        return NoLayout("a step has one slot only, and every other one goes another way: give slots=2 or more")
    size = -(-len(blocks) // stages)
    fitting = (n for n in range(min(size, len(blocks) // 4), 0, -1) if _can_swap(layers, blocks, n))
    count = next(fitting, 0)
    if not count:
        return NoLayout(
            f"of {len(blocks)} like layers the first and the last cannot change places with those beside them: at least 4 "
            "that pass on alike are needed"
        )
    begin, end = blocks.start, blocks.stop
    path = (
        *range(begin),
        *range(begin + count, begin + 2 * count),
        *range(begin, begin + count),
        *range(begin + 2 * count, end - 2 * count),
        *range(end - count, end),
        *range(end - 2 * count, end - count),
        *range(end, len(layers)),
    )
    assert not fault_of(path, len(layers)), path
    straight = tuple(range(len(layers)))
    return Ways((straight, path), tuple(slot % 2 for slot in range(model.slots)), copies_ends=True)


def skipping_ways(model: Model, workers: int, ratio: float) -> Ways | NoLayout:
    """Return ways that each pass by a share of the model, so chosen that a step is as short as was found.

    The model is taken in as many parts, of as many like layers, as there are stages; `ratio` is of them.
    """
    stages = stages_for(model, workers)
    count, most = round(ratio * stages), max(0, stages - 3)
    if not 1 <= count <= most:
        allowed = f"{1 / stages:.2f} to {most / stages:.2f}" if most else "none"
        return NoLayout(
            f"of {stages} stage(s) a slot cannot pass {count} by, as the first and the last are never left out, nor "
            f"all between them: allowed are {allowed}"
        )
    parts = _parts(model, stages)
    if not all(parts):
        return NoLayout(f"{len(_blocks_of(model.layers))} like layers cannot be taken in {stages} parts: use fewer stages")
    patterns = [
        each for each in itertools.combinations(range(1, stages - 1), count) if _longest_run(each) <= SKIPPED_MAX
    ]
    chosen = _spread(patterns, model.slots) if patterns else []
    if not patterns or max(Counter(itertools.chain(*chosen)).values()) == model.slots:
        return NoLayout(
            f"with {model.slots} slot(s), and no more than {SKIPPED_MAX} stages in a row, some would be left out by all: use a "
            "smaller --skip-ratio, or more slots"
        )
    if not all(_passes_on_alike(model.layers, _ways_of(parts, [each]).paths[0]) for each in patterns):
        return NoLayout("stages pass on different amounts, so that not all between the ends can be left out")
    patterns = patterns[:: -(-len(patterns) // PATTERNS_MAX)]
    typical = replace(model, layers=_typical(model.layers), memory_bytes=0)
    layout = lay_out(replace(typical, ways=_ways_of(parts, chosen)), workers)
    if isinstance(layout, NoLayout):
        return layout
    return _ways_of(parts, _improved(typical, layout, parts, patterns, chosen))


def _blocks_of(layers: Sequence[LayerProfile]) -> range:
    """From the first layer that has a like to the last: without embedding and head, of which there is one each."""
    times = Counter(layer.form for layer in layers)
    repeated = [number for number, layer in enumerate(layers) if layer.form and times[layer.form] > 1]
    inner = [number for number in repeated if 0 < number < len(layers) - 1]
    return range(inner[0], inner[-1] + 1) if inner else range(0)


def _can_swap(layers: Sequence[LayerProfile], blocks: range, count: int) -> bool:
    """Whether so many layers at both ends of the blocks can change places with as many beside them."""
    kinds = [(layer.form, layer.output_bytes) for layer in layers]
    for border in (blocks.start + count, blocks.stop - count):
        begin, end = border - count, border + count
        path = (begin - 1, *range(border, end), *range(begin, border), end)
        if kinds[begin:border] != kinds[border:end] or not _passes_on_alike(layers, path):
            return False
    return True


def _passes_on_alike(layers: Sequence[LayerProfile], path: Sequence[int]) -> bool:
    """Whether each layer of a path is given as much as it is where all go straight."""
    return all(layers[before].output_bytes == layers[after - 1].output_bytes for before, after in itertools.pairwise(path))


def _typical(layers: Sequence[LayerProfile]) -> tuple[LayerProfile, ...]:
    """The layers with costs that are not measured: that of a block is one."""
    blocks = _blocks_of(layers)
    costs = [1.0 if number in blocks else BESIDE for number in range(len(layers))]
    return tuple(replace(layer, forward_s=cost, backward_s=2 * cost) for layer, cost in zip(layers, costs, strict=True))


def _parts(model: Model, count: int) -> list[range]:
    """The model in parts of as many blocks; what is before them is in the first, what is behind them in the last."""
    blocks = _blocks_of(model.layers)
    borders = [blocks.start + round(number * len(blocks) / count) for number in range(count + 1)]
    borders[0], borders[-1] = 0, len(model.layers)
    return [range(first, last) for first, last in itertools.pairwise(borders)]


def _longest_run(numbers: Sequence[int]) -> int:
    """The length of the longest run of numbers that follow one another."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return max((len(list(run)) for _, run in runs), default=0)


def _spread(patterns: Sequence[tuple[int, ...]], slots: int) -> list[tuple[int, ...]]:
    """A pattern for each slot, such that parts are left out about equally often."""
    times: Counter[int] = Counter()
    chosen = []
    for _ in range(slots):
        pattern = min(patterns, key=lambda each: (sum((times[part] + 1) ** 2 - times[part] ** 2 for part in each), each))
        times.update(pattern)
        chosen.append(pattern)
    return chosen


def _unevenness(chosen: Sequence[tuple[int, ...]], parts: int) -> int:
    """How much more often one part between the ends is left out than another; a part that all leave out is the worst."""
    times = [sum(part in pattern for pattern in chosen) for part in range(1, parts - 1)]
    return len(chosen) if max(times) == len(chosen) else max(times) - min(times)


def _improved(
    model: Model,
    layout: Layout,
    parts: Sequence[range],
    patterns: Sequence[tuple[int, ...]],
    chosen: list[tuple[int, ...]],
) -> list[tuple[int, ...]]:
    """Exchange patterns, one or two slots at a time, for as long as a simulated step becomes shorter."""

    def seconds(tried: Sequence[tuple[int, ...]]) -> float:
        ways = _ways_of(parts, tried)
        return as_it_is(replace(model, ways=ways), layout.stages, layout.routes, {}).step_s

    best_s, uneven = seconds(chosen), max(1, _unevenness(chosen, len(parts)))
    for _ in range(ROUNDS_MAX):
        before_s = best_s
        for slot in range(len(chosen)):
            others = [[*chosen[:slot], pattern, *chosen[slot + 1 :]] for pattern in patterns if pattern != chosen[slot]]
            for other in range(slot + 1, len(chosen)):
                exchanged = list(chosen)
                exchanged[slot], exchanged[other] = chosen[other], chosen[slot]
                others.append(exchanged)
            for tried in others:
                is_even = tried != chosen and _unevenness(tried, len(parts)) <= uneven
                if is_even and (tried_s := seconds(tried)) < best_s:
                    best_s, chosen = tried_s, tried
        if best_s >= before_s:
            break
    return chosen


def _ways_of(parts: Sequence[range], chosen: Sequence[tuple[int, ...]]) -> Ways:
    found: dict[tuple[int, ...], int] = {}
    path_of = []
    for pattern in chosen:
        path = tuple(layer for number, part in enumerate(parts) if number not in pattern for layer in part)
        path_of.append(found.setdefault(path, len(found)))
    return Ways(tuple(found), tuple(path_of))
