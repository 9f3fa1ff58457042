"""Fences: after a fault the survivors seal at once, and go on in a new generation from the newest step that they can have.

    fault -> FENCE g: Prepare to all survivors -> all Prepared (sealed, group built, what they hold) -> `commits.py`

Here is decided who is in that generation; if nobody is left who holds the state, `restoring.py` brings it back. A fence
replaces whatever generation is on its way, and takes in nobody new unless it is told to.
"""

from __future__ import annotations

from collections.abc import Iterable

from controller.approximating import rebuild
from controller.attempts import abandon_switch, open_generation
from controller.endings import end_job
from controller.founding import found_anew
from controller.job import Job
from controller.layouts import is_whole
from controller.restoring import state_lost
from elastic.domain import PlanKind

FRUITLESS_LIMIT = 5  # generations in a row that failed although nobody was lost
GRACE_S = 0.25  # how long a broken collective waits for the loss that explains it


def fence(job: Job, reason: str, now: float, *, loss: bool, joining: Iterable[str] = ()) -> None:
    """Open a generation of the survivors, and of `joining`; everybody seals at once."""
    if job.outcome or job.finishing:
        return
    job.suspicion = None
    job.fruitless = 0 if loss else job.fruitless + 1
    if job.fruitless > FRUITLESS_LIMIT:
        end_job(job, "failed", f"{FRUITLESS_LIMIT} generations in a row failed with nobody lost; last: {reason}", now)
        return
    survivors = [w for w in job.membership() if job.workers[w].alive]
    abandon_switch(job, reason)
    if job.plan is None:
        found_anew(job, survivors, now)
        return
    attempt = job.attempt
    if attempt is not None and attempt.snapshot is not None and not attempt.committed:
        state_lost(job, reason, now)  # nobody has read it yet, so whoever is left holds nothing
        return
    members = _seats(job, survivors)
    if not members or not is_whole(job, job.plan, [w for w in members if job.workers[w].holds_state]):
        if job.settings.approximate and not job.settings.snapshot_every:  # else something exact is looked for first
            obstacle = rebuild(job, reason, now, joining)
            if not obstacle:
                return
            reason = f"{reason}; {obstacle}"
        state_lost(job, reason, now)
        return
    open_generation(job, PlanKind.FENCE, [*members, *joining], reason, now)


def _seats(job: Job, survivors: list[str]) -> list[str]:
    """Return who of the survivors is in the next world, in order of rank; the others are ended.

    Whoever holds the state comes first: with leavers of an unfinished switch there may be more workers than slots, and a
    worker whose loop has ended gives the state to nobody.
    """
    assert job.spec is not None
    holders = [w for w in survivors if job.workers[w].holds_state]
    others = [w for w in survivors if w not in holders]
    if any(job.workers[w].leaving for w in holders):
        others = []
    seated = [*holders, *others][: job.spec.seats]
    members = [w for w in survivors if w in seated]
    for worker_id in survivors:
        if worker_id not in members:
            job.kill(job.workers[worker_id], "the world goes on without it")
            job.workers[worker_id].state = "dead"
    return members
