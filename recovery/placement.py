"""Which nodes protect each other's snapshots, and where each block and its parity lies.

A protection group is RAID-6 in memory (REFT, generalised to m parities). The shard of a node, which is all slices of its
workers one behind the other, is cut into k equal blocks that stay where they are; only parity travels. Node i of n = k + m
stands at place d = (i - j) mod n of stripe j: it holds parity d of the stripe if d < m, otherwise its own block d - m
takes part as data shard d - m. Over the n stripes every node is at every place once, so it gives each of its k blocks
once and holds m parities: m/k of a shard more memory, and any m nodes of the group may be lost.

Values only: this file must never see bytes, nor which nodes are alive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from elastic.snapshots import aligned
from recovery.galois import SHARDS_MAX, check_code


@dataclass(frozen=True, slots=True)
class Site:
    """A node and where it stands.

    Attributes:
        node: its name.
        domain: what fails as one (a rack, a power feed); "" is a domain of its own.
    """

    node: str
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Stripe:
    """One code word of blocks: k data blocks of k nodes and m parity blocks on m others.

    Attributes:
        number: 0..n-1 within its group.
        data: (node, which of its blocks) of data shard 0..k-1 of the code, in this order.
        parity: the node that holds parity shard k.., in this order.
    """

    number: int
    data: tuple[tuple[str, int], ...]
    parity: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProtectionGroup:
    """Nodes whose shards are encoded together; any m of them may be lost.

    Attributes:
        nodes: k + m names.
        k, m: data and parity shards of each stripe.
    """

    nodes: tuple[str, ...]
    k: int
    m: int

    def __post_init__(self) -> None:
        if len(self.nodes) != self.k + self.m:
            raise ValueError(f"a group of {len(self.nodes)} nodes cannot carry the code ({self.k},{self.m})")

    def stripes(self) -> tuple[Stripe, ...]:
        """As many as nodes, in order of their numbers."""
        size = len(self.nodes)
        return tuple(
            Stripe(
                number=j,
                data=tuple((self.nodes[(j + self.m + block) % size], block) for block in range(self.k)),
                parity=tuple(self.nodes[(j + place) % size] for place in range(self.m)),
            )
            for j in range(size)
        )

    def block_bytes(self, shard_bytes: int) -> int:
        """The length of a block, in bytes: aligned, so that k of them hold the shard and the rest of them is zeros.

        Args:
            shard_bytes: of the longest shard in the group; the blocks of a stripe have one length.
        """
        return aligned(-(-shard_bytes // self.k))


def make_groups(sites: Sequence[Site], k: int, m: int, overhead_max: float = inf) -> tuple[ProtectionGroup, ...]:
    """Divide the nodes into protection groups of k + m, or as near to it as their number allows.

    m is kept everywhere. Where nodes are left over, they either join the other groups or make one group more while k
    shrinks everywhere: whatever keeps a failure domain to m nodes of each group, then whatever is nearer to k + m, then
    the smaller groups. The order of `sites` does not matter.

    Args:
        sites: the nodes, each once.
        k, m: what is asked for.
        overhead_max: the most that parity may take, as a fraction of a shard; where a smaller k would exceed it, the
            groups are larger instead.

    Returns:
        The groups in order of their first nodes, themselves in order; none where nothing can be protected, which is
        with m or fewer nodes, with m = 0, or if even the largest group exceeds `overhead_max`. `warnings` says why.

    Raises:
        ConfigError: no code has these sizes.
        ValueError: a node is named twice.
    """
    check_code(k, m)
    if len({site.node for site in sites}) != len(sites):
        raise ValueError(f"a node is named twice in {sorted(site.node for site in sites)}")
    domains = Counter(_domain(site) for site in sites)
    # Dealt domain by domain, like cards, so that no group gets more of a domain than it must: ceil(nodes / groups).
    dealt = sorted(sites, key=lambda site: (-domains[_domain(site)], _domain(site), site.node))

    def badness(count: int) -> tuple[bool, int, int]:
        return max(domains.values()) > m * count, abs(len(sites) - count * (k + m)), -count

    counts = [count for count in range(1, -(-len(sites) // (k + m)) + 1) if _fits(len(sites), count, m, overhead_max)]
    if m == 0 or not counts:
        return ()
    count = min(counts, key=badness)
    groups = sorted(tuple(sorted(site.node for site in dealt[i::count])) for i in range(count))
    return tuple(ProtectionGroup(nodes, len(nodes) - m, m) for nodes in groups)


def warnings(sites: Sequence[Site], k: int, m: int, overhead_max: float = inf) -> tuple[str, ...]:
    """In what `make_groups` with the same arguments falls short of the wish, a sentence each; none if in nothing."""
    groups = make_groups(sites, k, m, overhead_max)
    if not groups:
        return (_why_no_groups(len(sites), m, overhead_max),)
    said = []
    least = min(group.k for group in groups)
    if least < k:
        said.append(
            f"{len(sites)} nodes are no groups of {k + m}: k is as low as {least}, so parity takes {m / least:.0%} of a "
            f"snapshot instead of {m / k:.0%}."
        )
    domain_of = {site.node: site.domain for site in sites if site.domain}
    worst: Counter[str] = Counter()
    for group in groups:
        worst |= Counter(domain_of[node] for node in group.nodes if node in domain_of)
    said += [
        f"Failure domain {domain} has {count} nodes in one protection group, but a group survives the loss of {m}: "
        "the snapshots do not survive that domain; use more domains, a larger m, or a smaller k."
        for domain, count in sorted(worst.items())
        if count > m
    ]
    return tuple(said)


def _domain(site: Site) -> tuple[bool, str]:
    """A node without a domain is one by itself, and never the one of that name."""
    return (True, site.domain) if site.domain else (False, site.node)


def _fits(nodes: int, count: int, m: int, overhead_max: float) -> bool:
    """Whether so many even groups are possible codes within the overhead."""
    smallest, largest = nodes // count, -(-nodes // count)
    return smallest > m and largest <= SHARDS_MAX and m <= overhead_max * (smallest - m)


def _why_no_groups(nodes: int, m: int, overhead_max: float) -> str:
    if m == 0:
        return "Snapshots are not protected against the loss of a node: m is 0."
    if nodes <= m:
        return (
            f"Snapshots are not protected: {nodes} nodes cannot survive the loss of {m}; use more nodes or a smaller m."
        )
    largest = min(nodes, SHARDS_MAX)
    return (
        f"Snapshots are not protected: even a group of {largest} nodes needs {m / (largest - m):.0%} of a snapshot for "
        f"parity, but {overhead_max:.0%} are allowed; allow more, or use a smaller m."
    )
