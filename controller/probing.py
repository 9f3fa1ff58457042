"""Questions to nodes about each other: which pairs cannot reach each other, and who has to go so that all others can.

    doubt -> ProbePeers to all nodes concerned -> PeersProbed from each, or its time is up -> pairs, asked once more and for
    longer, since a busy agent answers late -> the smallest cover

Two nodes may both reach the controller and not each other: their leases are good, their processes run, and the world stands
still. Only they can tell. Nothing here loses a node or opens a generation; `links.py` acts on what is found.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping

from controller.events import ToAgent
from controller.job import Job
from controller.state import Probing
from elastic.domain import Peer, PeersProbed, ProbePeers

Pair = tuple[str, str]
"""Two nodes, in alphabetical order."""

EXACT_NODES_MAX = 12  # beyond that many in doubt the cover is found greedily


def begin_probing(
    job: Job,
    nodes: Collection[str],
    reason: str,
    now: float,
    *,
    then_fence: bool,
    suspected: frozenset[Pair] | None = None,
) -> bool:
    """Ask these nodes which of the others they reach; returns whether there is anybody to ask."""
    here = [job.nodes[node] for node in sorted(nodes) if node in job.nodes and job.nodes[node].attached]
    if len(here) < 2 or job.probing is not None:
        return job.probing is not None
    timeout_s = job.settings.failure_timeout_s / (4 if suspected is None else 2)
    asked = {node.id: frozenset(other.id for other in here if other is not node) for node in here}
    job.probing = Probing(job.newest_generation, reason, asked, now + 1.5 * timeout_s, then_fence, suspected)
    for node in here:
        peers = tuple(Peer(other.id, other.peer_address) for other in here if other is not node)
        job.emit(ToAgent(node.incarnation, ProbePeers(job.newest_generation, peers, int(timeout_s * 1000))))
    return True


def take_answer(job: Job, node: str, answer: PeersProbed) -> None:
    """Note what a node found."""
    probing = job.probing
    if probing is not None and answer.generation == probing.generation and node in probing.asked:
        probing.answers[node] = frozenset(answer.unreachable) & probing.asked[node]


def dead_pairs(answers: Mapping[str, Collection[str]]) -> frozenset[Pair]:
    """Return the pairs of which at least one cannot reach the other."""
    return frozenset(
        (min(node, peer), max(node, peer)) for node, unreachable in answers.items() for peer in unreachable
    )


def smallest_cover(pairs: Iterable[Pair], costs: Mapping[str, int]) -> tuple[str, ...]:
    """Return the nodes to leave out so that all others reach each other: as few workers as possible.

    Exact up to EXACT_NODES_MAX nodes in doubt (there are seldom more than three), then whoever is in most pairs goes first.
    Of equals the last in the order of `costs` goes.

    Args:
        pairs: Those that cannot reach each other.
        costs: Node -> its workers, in an order of preference.
    """
    left = set(pairs)
    order = list(costs)
    doubtful = sorted({node for pair in left for node in pair}, key=order.index, reverse=True)
    if len(doubtful) <= EXACT_NODES_MAX:
        candidates = (
            chosen
            for size in range(len(doubtful) + 1)
            for chosen in itertools.combinations(doubtful, size)
            if all(one in chosen or other in chosen for one, other in left)
        )
        best = min(candidates, key=lambda chosen: (sum(costs[node] for node in chosen), len(chosen)))
        return tuple(sorted(best))
    cover: list[str] = []
    while left:
        worst = max(doubtful, key=lambda node: sum(node in pair for pair in left))
        cover.append(worst)
        left = {pair for pair in left if worst not in pair}
    return tuple(sorted(cover))
