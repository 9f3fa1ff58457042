"""How likely snapshots in memory survive: exact, by counting or as a sum of binomial terms.

Two questions. Given that f nodes are lost at once, each set of f as likely as any other: `groups_survive`, `pairs_survive`
and `ring_survives`, as fractions. Given that each node is lost by itself with probability q while redundancy is not rebuilt:
`independent_loss`. Losses that come together, a rack or a power feed, are in neither: groups are spread over failure
domains against those (`recovery.placement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import comb, expm1, log1p


def groups_survive(sizes: Sequence[int], m: int, losses: int) -> Fraction:
    """The probability that no group loses more than m nodes, when so many of all nodes are lost.

    Args:
        sizes: of the protection groups, in nodes.
        m: how many losses each survives.
        losses: 0..sum(sizes).
    """
    nodes = sum(sizes)
    _check(nodes, losses)
    ways = [1] + [0] * losses  # ways[f]: to lose f nodes of the groups so far, none of them more than m
    for size in sizes:
        ways = [sum(ways[f - j] * comb(size, j) for j in range(min(m, f) + 1)) for f in range(losses + 1)]
    return Fraction(ways[losses], comb(nodes, losses))


def pairs_survive(nodes: int, losses: int) -> Fraction:
    """The same where two nodes each hold a whole copy of the other's shard (Gemini with two copies); nodes is even."""
    if nodes % 2:
        raise ValueError(f"{nodes} nodes are no pairs")
    return groups_survive([2] * (nodes // 2), 1, losses)


def ring_survives(nodes: int, losses: int) -> Fraction:
    """The same where each node's shard has one whole copy on the next node of a ring: no two neighbours may be lost.

    f of N places on a circle without neighbours can be chosen in N / (N - f) * C(N - f, f) ways.
    """
    _check(nodes, losses)
    if losses == 0:
        return Fraction(1)
    if 2 * losses > nodes:
        return Fraction(0)
    return Fraction(nodes * comb(nodes - losses, losses), (nodes - losses) * comb(nodes, losses))


def loss_probability(failures_per_s: float, window_s: float) -> float:
    """The probability that a node is lost within a window, when its failures come at a constant rate."""
    return -expm1(-failures_per_s * window_s)


def independent_loss(sizes: Sequence[int], m: int, q: float) -> float:
    """The probability that some group loses more than m nodes, when each node is lost by itself with probability q.

    It is 1 - product of sum_{j <= m} C(n, j) q^j (1 - q)^(n - j), but summed over what is lost: small ones keep their digits.

    Args:
        sizes: of the protection groups, in nodes.
        m: how many losses each survives.
        q: 0..1, see `loss_probability`.
    """
    log_survival = 0.0
    for size in sizes:
        lost = sum(comb(size, j) * q**j * (1 - q) ** (size - j) for j in range(m + 1, size + 1))
        if lost >= 1:
            return 1.0
        log_survival += log1p(-lost)
    return -expm1(log_survival)


def _check(nodes: int, losses: int) -> None:
    if not 0 <= losses <= nodes:
        raise ValueError(f"of {nodes} nodes {losses} cannot be lost")
