"""Whether a snapshot of the present world is safe everywhere, and for how long none has been.

    the world changes -> vulnerable: what older worlds left is protected by fewer nodes than it was, or by one that leaves
    a snapshot of the new world is stable -> redundancy is as good as this world allows (`recovery/plan.py` says how good)

Only looked at where snapshots are taken. Nothing here decides what is protected by whom; workers take their first snapshot
of a world at once, whatever their cadence (`elastic/snapshotter.py`).
"""

from __future__ import annotations

from controller.events import Persist
from controller.job import Job
from controller.saving import stable_step

DRAIN_PATIENCE_S = 60.0  # how long a node that is drained stays for the sake of a snapshot that is not taken
WORTH_TELLING_S = 1.0
PRIOR_S = 3600.0


def begin_vulnerable(job: Job, now: float) -> None:
    """The world is about to change."""
    if job.settings.snapshot_every and job.vulnerable_since is None:
        job.vulnerable_since = now
    job.protected_after = None


def world_began(job: Job, step: int, now: float) -> None:
    """A world has begun after this step: snapshots of later ones are its own."""
    begin_vulnerable(job, now)
    job.protected_after = step


def check_redundancy(job: Job, now: float) -> None:
    """Look whether the present world has a stable snapshot of its own by now."""
    since, after = job.vulnerable_since, job.protected_after
    if since is None or after is None or stable_step(job) <= after:
        return
    job.vulnerable_since = None
    seconds = now - since
    job.vulnerable_s += seconds
    told = f"for {seconds:.1f} s" if seconds >= WORTH_TELLING_S else "for a moment"
    job.emit(
        Persist(
            "redundancy-restored",
            f"the snapshot of step {stable_step(job)} is safe in the world of generation {job.newest_generation}; "
            f"none was {told}",
            {"seconds": seconds},
        )
    )


def vulnerable_s(job: Job, now: float) -> float:
    """Return the seconds in which the world of the time had no stable snapshot of its own, up to now."""
    since = job.vulnerable_since
    return job.vulnerable_s + (now - since if since is not None and not job.outcome else 0.0)


def restores_per_s(job: Job, now: float) -> float:
    """How often the job goes back to a snapshot: what was seen, beside the one in an hour that is believed beforehand."""
    trained_s = now - job.first_commit_at if job.first_commit_at is not None else 0.0
    return (1 + job.restores) / (PRIOR_S + trained_s)


def may_leave(job: Job, waits_since: float, now: float) -> bool:
    """Whether a drained node's memory is needed no more: the others have a safe snapshot, or none that is to be expected."""
    stands = job.finishing or (job.attempt is not None and job.attempt.waits_for_nodes)
    return job.vulnerable_since is None or stands or now - waits_since > DRAIN_PATIENCE_S
