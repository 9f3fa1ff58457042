"""Promises, one small file each. A checker sees everything and raises Violation; it never touches anything.

Its methods `on_<hook>` are called by `World.observe`: said, entered, voted, reduced, applied, received, exited (of
workers), forked, agent_ended, persisted, sent (of the controller), over.
"""

from __future__ import annotations

from tests.sim.checkers.agreement import Agreement
from tests.sim.checkers.deals import DealtAlike
from tests.sim.checkers.endings import Endings
from tests.sim.checkers.exactly_once import ExactlyOnce
from tests.sim.checkers.fencing import Fencing
from tests.sim.checkers.ledger_law import LedgerLaw
from tests.sim.checkers.pairs import Pairs
from tests.sim.site import Site

Checker = Agreement | DealtAlike | Endings | ExactlyOnce | Fencing | LedgerLaw | Pairs


def make_checkers(site: Site) -> tuple[Checker, ...]:
    return (
        Fencing(site.clock),
        ExactlyOnce(site.scenario),
        Agreement(hostile=site.scenario.hostile, is_cut=site.scenario.spec.holds_parts),
        LedgerLaw(site),
        Endings(site),
        Pairs(),
        *(() if site.scenario.spec.holds_parts else (DealtAlike(),)),  # parts and rounds exclude each other
    )
