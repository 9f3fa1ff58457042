"""The way of a slot through the layers: straight, or in another order, or past some of them.

A path names layers, not stages, so that what is trained does not depend on where the model is cut. Cut at the stages it becomes
visits: what a slot passes at one stage before it goes on to another. A slot may visit a stage twice, or not at all. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.domain import Stage

Path = Sequence[int]
"""Numbers of layers in the order in which a slot passes them; the first and the last layer are at its ends."""


@dataclass(frozen=True, slots=True)
class Visit:
    """What a slot passes at one stage without leaving it.

    Attributes:
        stage: its number. layers: numbers of layers, in order.
    """

    stage: int
    layers: tuple[int, ...]


def visits_of(stages: Sequence[Stage], path: Path | None = None) -> tuple[Visit, ...]:
    """Return the visits of a path, straight through all layers if there is none."""
    if path is None:
        return tuple(Visit(number, tuple(range(s.first, s.last))) for number, s in enumerate(stages))
    stage_of = {layer: number for number, s in enumerate(stages) for layer in range(s.first, s.last)}
    found: list[Visit] = []
    for layer in path:
        if found and found[-1].stage == stage_of[layer]:
            found[-1] = Visit(found[-1].stage, (*found[-1].layers, layer))
        else:
            found.append(Visit(stage_of[layer], (layer,)))
    return tuple(found)


def all_visits(
    stages: Sequence[Stage], slots: int, paths: Sequence[Path] = ()
) -> tuple[tuple[Visit, ...], ...]:
    """Return the visits of each slot.

    Args:
        paths: of each slot; none: all go straight.
    """
    if not paths:
        return (visits_of(stages),) * slots
    found = {tuple(path): visits_of(stages, path) for path in paths}
    return tuple(found[tuple(path)] for path in paths)


def fault_of(path: Path, layers: int) -> str:
    """Return "" if a path can be taken through so many layers, else what is wrong with it."""
    if not path or path[0] != 0 or path[-1] != layers - 1:
        return f"it does not lead from layer 0 to layer {layers - 1}"
    if len(set(path)) != len(path) or not all(0 <= layer < layers for layer in path):
        return "it passes a layer twice, or one that there is not"
    return ""
