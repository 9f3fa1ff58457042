"""Switches: warm workers are taken in and leavers let go, while the others train on.

    join/leave -> SWITCH g: Prepare to all -> all Prepared (group built aside, training goes on; a joiner is warm too)
               -> `commits.py`; the verdict of a step decides when everybody has it, and all adopt at that boundary

Here is decided who joins and who leaves; layers of a pipeline may also move among those who stay (`straggling.py`). A switch
never interrupts a step, and is never begun while a fault is not settled. Only a job
that stands still for want of nodes takes joiners in by a fence.
"""

from __future__ import annotations

from controller.attempts import open_generation
from controller.fencing import fence
from controller.job import Job
from controller.state import Attempt, natural
from controller.straggling import worth_moving
from elastic.domain import PlanKind

SWITCH_RETRIES = 3  # attempts to take a joiner in before it is replaced


def consider_switch(job: Job, now: float) -> None:
    """Take warm workers in and let leavers go, if nothing else is on its way."""
    if job.plan is None or job.spec is None or job.outcome or job.finishing or job.recovering_until is not None:
        return
    if job.restoring is not None:
        return
    if job.suspicion is not None or any(w.leaving for w in job.workers.values() if w.alive):
        return
    if job.attempt is not None:
        if job.attempt.waits_for_nodes:
            _reinforce(job, job.attempt, now)
        return
    members = job.plan.members
    leaving = [m for m in members if job.nodes[m.node].state == "draining"]
    joining = _joiners(job, len(members) - len(leaving))
    staying = [m for m in members if m not in leaving]
    nodes = {m.node for m in staying} | {job.workers[w].node for w in joining}
    holders = [w for w in job.known(staying) if w.holds_state]
    if leaving and (not holders or len(nodes) < job.settings.nodes_min):
        # They go once others hold the state, and enough others are there.
        staying, leaving = list(members), []
        joining = _joiners(job, len(members))
    why = "" if joining or leaving else worth_moving(job)
    if not joining and not leaving and not why:
        return
    if not any(w.holds_state for w in job.known(members)):
        return  # they are about to read it themselves
    words = [why] if why else []
    words += [f"{', '.join(joining)} joins"] if joining else []
    words += [f"{', '.join(m.worker for m in leaving)} leaves"] if leaving else []
    open_generation(
        job, PlanKind.SWITCH, [*(m.worker for m in staying), *joining], "; ".join(words), now, leavers=leaving
    )


def _joiners(job: Job, seats_taken: int, *, warm_only: bool = False) -> list[str]:
    """Return who may be taken in, as many as there are slots for.

    A switch may be prepared while a joiner warms up, since it costs the members nothing; one that was too slow for
    that is waited for first.
    """
    assert job.spec is not None
    ready = [
        w
        for w in job.workers.values()
        if (w.state == "warm" or (w.state == "warming" and not (warm_only or w.warms_slowly)))
        and job.nodes[w.node].state == "attached"
        and not job.is_member(w)
    ]
    ready.sort(key=lambda w: (w.state != "warm", w.switch_failures, natural(w.node), w.local_rank))
    return [w.id for w in ready][: max(0, job.spec.seats - seats_taken)]


def _reinforce(job: Job, attempt: Attempt, now: float) -> None:
    """Too few nodes are left to go on: take new ones in at once, since no step is running that could decide it."""
    joining = _joiners(job, attempt.plan.world_size, warm_only=True)
    nodes = {m.node for m in attempt.plan.members} | {job.workers[w].node for w in joining}
    if len(nodes) >= job.settings.nodes_min:
        fence(job, f"{', '.join(joining)} joins", now, loss=True, joining=joining)


def retry_switch_later(job: Job) -> None:
    """A group with the joiners could not be built: they are tried again, and replaced where that happens too often."""
    for worker in job.workers.values():
        if worker.state == "warm":
            worker.switch_failures += 1
            if worker.switch_failures > SWITCH_RETRIES:
                job.kill(worker, "it could not be taken in")
