"""Layers that nobody has any more, from those of the neighbouring stages: CheckFree (arXiv 2506.15461, section 4).

A lost stage between two that live becomes their average, layer by layer, each weighted by the norm of its stage's newest
gradient: whoever is less converged counts for more. Stages need not have as many layers: one at half the depth of its stage is
made from those at half the depth of theirs. Of several lost stages in a row each is interpolated between the nearest ones
that live. A layer that has changed places with another in half of the slots becomes a copy of that (CheckFree+), and one that
is kept up with elsewhere is not lost at all: only so the first and the last stage can be had again. What is made so is not
what was lost; who may take it, and who is told, is `controller/approximating.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from elastic.domain import Blend, LayerProfile, Stage

STAGES_MIN = 3
"""With fewer there is no stage between two others."""


@dataclass(frozen=True, slots=True)
class NoBlend:
    """A layer cannot be made from others; `reason` says which one, in words."""

    reason: str


def aligned(position: int, count: int, other: int) -> int:
    """Return the position, among `other` layers, at the same relative depth as `position` among `count`.

    The middle of a layer counts: of two layers onto four, 0 and 1 become 1 and 3; onto one, both become 0.
    """
    return min(int((position + 0.5) / count * other), other - 1)


def blends_for(
    layers: Sequence[LayerProfile],
    stages: Sequence[Stage],
    lost: Collection[int],
    norms: Mapping[int, float],
    exponent: float = 1.0,
    *,
    partners: Mapping[int, int] | None = None,
    kept: Collection[int] = (),
    moments: bool = False,
) -> tuple[Blend, ...] | NoBlend:
    """Return how each layer of the lost stages is made from layers of others.

    Args:
        layers: of the whole model; two are alike if their `form` is. stages: of the world that has lost some of them.
        lost: numbers of those stages. norms: of each stage's newest gradient (L2); one that is missing, zero or not finite
            makes all of a layer's sources count alike.
        exponent: to which norms are raised: 0 for a plain mean, 1 as published, 2 for squares.
        partners: layer -> the one that it has changed places with. kept: layers that somebody has although their stage is lost.
        moments: whether the state of optimizers is made, too.
    """
    partners = partners or {}
    gone = {layer for number in lost for layer in range(stages[number].first, stages[number].last)} - set(kept)
    found: list[Blend] = []
    alive = [number for number in range(len(stages)) if number not in lost]
    for number in sorted(lost):
        stage = stages[number]
        below = max((other for other in alive if other < number), default=None)
        above = min((other for other in alive if other > number), default=None)
        for layer in range(stage.first, stage.last):
            if layer not in gone or not layers[layer].form:
                continue  # nothing of it is lost
            if partners.get(layer, layer) not in gone:
                found.append(Blend(layer, (partners[layer],), (1.0,), moments))
                continue
            if below is None or above is None:
                return NoBlend(_one_sided(layer, "first" if below is None else "last", partners))
            # Of a run of losses the nearer neighbour counts for more (in the middle both alike).
            nearness = {below: float(above - number), above: float(number - below)}
            sources = {
                other: like
                for other in (below, above)
                if (like := _like(layers, stage, layer, stages[other])) is not None
            }
            if not sources:
                return NoBlend(
                    f"layer {layer} has no like in the neighbouring stages (layers {stages[below].first} to "
                    f"{stages[below].last - 1} and {stages[above].first} to {stages[above].last - 1})"
                )
            found.append(Blend(layer, tuple(sources.values()), _weights(sources, nearness, norms, exponent), moments))
    return tuple(found)


def _one_sided(layer: int, place: str, partners: Mapping[int, int]) -> str:
    if layer in partners:
        return f"layer {layer} of the {place} stage and its partner, layer {partners[layer]}, are both lost"
    return (
        f"the {place} stage has one neighbour only, and an average needs two (layer {layer} has no partner"
        + (")" if partners else ": --swap-ends)")
    )


def check_stages(
    layers: Sequence[LayerProfile],
    stages: Sequence[Stage],
    partners: Mapping[int, int] | None = None,
    kept: Collection[int] = (),
) -> str:
    """Return "" if each stage that could be lost could be made from others, else why not: with partners all, or else those
    between the first and the last. `kept` are the layers that are kept up with.
    """
    if len(stages) < STAGES_MIN:
        return f"there are {len(stages)} stage(s), and only a stage between two others can be made from them"
    ends = 0 if partners or kept else 1
    for number in range(ends, len(stages) - ends):
        found = blends_for(layers, stages, (number,), {}, partners=partners, kept=kept)
        if isinstance(found, NoBlend):
            return found.reason
    return ""


def sentence(blends: Sequence[Blend]) -> str:
    """Return in words what is made from what."""
    if not blends:
        return "nothing of the lost stage is lost: others have kept up with all of its layers"
    made = (
        f"{blend.layer} = "
        + " + ".join(f"{weight:.3f} x {source}" for source, weight in zip(blend.sources, blend.weights, strict=True))
        for blend in blends
    )
    return f"lost layers are made from others, approximately: {'; '.join(made)}"


def _like(layers: Sequence[LayerProfile], stage: Stage, layer: int, other: Stage) -> int | None:
    """The layer of another stage, of the same form, that is nearest to the same relative depth."""
    wanted = other.first + aligned(layer - stage.first, stage.last - stage.first, other.last - other.first)
    alike = [each for each in range(other.first, other.last) if layers[each].form == layers[layer].form]
    return min(alike, key=lambda each: (abs(each - wanted), each), default=None)


def _weights(
    sources: Mapping[int, int], nearness: Mapping[int, float], norms: Mapping[int, float], exponent: float
) -> tuple[float, ...]:
    """What each source counts, in all 1."""
    known = [norms.get(number, 0.0) for number in sources]
    is_usable = all(math.isfinite(norm) and norm > 0 for norm in known)
    weights = [
        nearness[number] * (norm**exponent if is_usable else 1.0) for number, norm in zip(sources, known, strict=True)
    ]
    return tuple(weight / sum(weights) for weight in weights)
