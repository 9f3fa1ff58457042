"""Who exchanges with whom, round after round, without a word about it: NoLoCo's pairs (arXiv 2506.10911, section 3).

Every rank of a world computes the same pairs from what all know: the run's seed, the generation and the round. So a pair is of
one world, and what two ranks made of each other in a world that broke is no pair's in the next. A pure function.
"""

from __future__ import annotations

from elastic.sampler import Permutation

ALONE = -1
"""Nobody's rank: the odd one out has no partner."""


def partners_of(seed: int, generation: int, step: int, world_size: int) -> tuple[int, ...]:
    """Return the partner of each rank in a round; ALONE for the odd one out."""
    order = Permutation(world_size, f"elastic.pairs {seed} {generation} {step}".encode()).take(0, world_size)
    partners = [ALONE] * world_size
    for first, second in zip(order[::2], order[1::2], strict=False):
        partners[first], partners[second] = second, first
    return tuple(partners)
