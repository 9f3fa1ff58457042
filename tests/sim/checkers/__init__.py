"""Promises, one small file each. A checker sees everything and raises Violation; it never touches the cluster.

Its methods `on_<hook>` are called by `Cluster.observe`: said, entered, voted, reduced, applied, received, exited (of
workers), forked, agent_ended, persisted, sent (of the controller), over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.checkers.agreement import Agreement
from tests.sim.checkers.endings import Endings
from tests.sim.checkers.exactly_once import ExactlyOnce
from tests.sim.checkers.fencing import Fencing
from tests.sim.checkers.ledger_law import LedgerLaw

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

Checker = Agreement | Endings | ExactlyOnce | Fencing | LedgerLaw


def make_checkers(cluster: Cluster) -> list[Checker]:
    return [
        Fencing(cluster.clock),
        ExactlyOnce(cluster.scenario),
        Agreement(hostile=cluster.scenario.hostile),
        LedgerLaw(),
        Endings(cluster),
    ]
