"""Worlds that stand still, and dead links between nodes that all reach the controller.

    all members wait, nothing moves        -> probe; a dead pair: the smallest set of nodes that explains it goes
    a generation broke with nobody lost    -> probe; a dead pair: likewise; none: fence the same members anew
    a node that went for a dead link       -> probe now and then; it reaches all again: its places are filled

A world that waits for a worker in user code does not stand still, and one whose reduction takes long is left alone as long as
no link is dead, up to the hang timeout; one that passes its state on, for as long as it takes. Here is also found a rank that
has left the loop alone.
"""

from __future__ import annotations

from controller.attempts import suspect
from controller.endings import end_job
from controller.events import Persist
from controller.fencing import GRACE_S, fence
from controller.inquiring import WORLD, begin_inquiry
from controller.job import Job
from controller.losses import workers_lost
from controller.places import fill_places
from controller.probing import begin_probing, dead_pairs, smallest_cover
from controller.state import Node, Standstill, Worker
from elastic.domain import PlanKind
from monitoring.hangs import hang_timeout_s, suspicion_s


def fence_if_unexplained(job: Job, now: float) -> None:
    """Act on a world that broke, once the loss that would explain it has had its time to be found."""
    suspicion = job.suspicion
    if suspicion is None or job.restoring is not None or now - suspicion.since <= GRACE_S or job.probing is not None:
        return
    if not begin_probing(job, _nodes_in_doubt(job), suspicion.reason, now, then_fence=True):
        _fence_anew(job, suspicion.reason, now)


def _fence_anew(job: Job, reason: str, now: float) -> None:
    job.open_incident("collective broken", WORLD, "worker report", reason, now)
    fence(job, reason, now, loss=False)


def _nodes_in_doubt(job: Job) -> set[str]:
    members = {job.workers[worker].node for worker in job.membership() if job.workers[worker].alive}
    return members | ({m.node for m in job.attempt.plan.members} if job.attempt is not None else set())


def check_probing(job: Job, now: float) -> None:
    """Draw the conclusion from what was probed, once all have answered or their time is up."""
    probing = job.probing
    if probing is None or (now < probing.deadline and len(probing.answers) < len(probing.asked)):
        return
    job.probing = None
    pairs = dead_pairs(probing.answers)
    if pairs and probing.suspected is None:
        begin_probing(job, probing.asked, probing.reason, now, then_fence=probing.then_fence, suspected=pairs)
        return
    pairs &= probing.suspected or frozenset()
    returned = [job.nodes[n] for n in probing.asked if job.nodes[n].cut_from and n in probing.answers]
    for node in returned:
        if not any(node.id in pair for pair in pairs):
            _take_in_again(job, node)
    # A node that is left out already explains the pairs that it is in.
    new = [pair for pair in pairs if not any(job.nodes[node].cut_from for node in pair)]
    costs = {node: sum(w.alive for w in job.workers.values() if w.node == node) for node in probing.asked}
    for node_id in smallest_cover(new, costs):
        _leave_out(job, node_id, frozenset(other for pair in new if node_id in pair for other in pair) - {node_id}, now)
    if not new and probing.then_fence and job.suspicion is not None:
        _fence_anew(job, probing.reason, now)


def _take_in_again(job: Job, node: Node) -> None:
    node.cut_from = frozenset()
    job.emit(Persist("link-healed", f"node {node.id} reaches all others again", {"node": node.id}))
    fill_places(job, node)


def _leave_out(job: Job, node_id: str, cut_from: frozenset[str], now: float) -> None:
    """Go on without a node that reaches the controller and not its peers."""
    node = job.nodes[node_id]
    if not node.attached:
        return
    node.cut_from = cut_from
    reason = f"it cannot reach {', '.join(sorted(cut_from))}"
    job.emit(Persist("link-dead", f"node {node_id} is left out: {reason}", {"node": node_id, "peers": sorted(cut_from)}))
    lost = [w for w in job.workers.values() if w.node == node_id and w.alive]
    for worker in lost:
        job.kill(worker, reason)
    since = job.standstill.since if job.standstill is not None else now
    workers_lost(job, lost, "link dead", f"node {node_id}", reason, "probe", now, silent_s=now - since)


def probe_left_out(job: Job, now: float) -> None:
    """Ask now and then whether nodes that were left out for a dead link reach all others again."""
    left_out = [node for node in job.nodes.values() if node.cut_from and node.attached]
    if not left_out or job.probing is not None or now - job.probed_cut_at < job.settings.failure_timeout_s:
        return
    job.probed_cut_at = now
    concerned = {node.id for node in left_out}.union(*(node.cut_from for node in left_out))
    if not begin_probing(job, concerned | _nodes_in_doubt(job), "a link was dead", now, then_fence=False):
        for node in left_out:
            _take_in_again(job, node)  # nobody is left whom it could not reach


def _is_fresh(job: Job, worker: Worker, now: float) -> bool:
    """Whether what its node said of a worker is not too old to be true."""
    return now - job.nodes[worker.node].heard_at < job.settings.failure_timeout_s / 4


def check_standstill(job: Job, now: float) -> None:
    """Look whether all members wait for each other and nothing moves."""
    seen = _standstill_of(job, now)
    if seen is None:
        job.standstill = None
        return
    if job.standstill is None or job.standstill.seen != seen:
        job.standstill = Standstill(seen, now, now)
        return
    still = job.standstill
    patience_s = job.settings.failure_timeout_s / 2
    if now - still.since < patience_s:
        return
    members = [job.workers[worker] for worker, _, _ in seen]
    leavers = [worker for worker in members if worker.leaving is not None]
    if leavers and len(leavers) < len(members) and job.attempt is None:
        _end_with_early_leavers(job, leavers, members, now)
        return
    assert job.plan is not None
    limit_s = hang_timeout_s(job.settings.hang_timeout_s, job.steps.median_s())
    if now - still.since > suspicion_s(limit_s) and not still.is_looked_into and not _passes_state(job):
        still.is_looked_into = True
        begin_inquiry(job, WORLD, now)
    if now - still.since > limit_s and not _passes_state(job):
        suspect(job, job.plan.generation, f"all workers waited for each other for {now - still.since:.1f} s", now)
        job.standstill = None
    elif now - still.probed_at >= patience_s or still.probed_at == still.since:
        still.probed_at = now
        begin_probing(job, _nodes_in_doubt(job), "all workers wait for each other", now, then_fence=False)


def _standstill_of(job: Job, now: float) -> tuple[tuple[str, int, int], ...] | None:
    """Return what the members' statuses say if all of them wait or have left the loop, else None."""
    attempt = job.attempt
    if job.plan is None or job.suspicion is not None or job.restoring is not None or job.finishing:
        return None
    if attempt is not None and not attempt.committed and not attempt.may_be_abandoned:
        return None  # nobody trains; it has a deadline of its own
    leaving = () if attempt is None or not attempt.committed else attempt.leavers
    members = [job.workers[member.worker] for member in (*job.plan.members, *leaving)]
    if not all(w.alive and (w.leaving or (w.status.waits and _is_fresh(job, w, now))) for w in members):
        return None
    return tuple((worker.id, worker.status.committed, worker.status.progress) for worker in members)


def _passes_state(job: Job) -> bool:
    """Whether a world has been entered in which somebody does not hold the state yet: nothing is committed meanwhile."""
    attempt = job.attempt
    if attempt is None or not attempt.committed:
        return False
    return attempt.plan.kind is not PlanKind.SWITCH or attempt.plan.workers() - job.joiners <= attempt.switched


def _end_with_early_leavers(job: Job, leavers: list[Worker], members: list[Worker], now: float) -> None:
    first = leavers[0]
    assert first.leaving is not None
    names = ", ".join(worker.id for worker in leavers)
    waiting = ", ".join(worker.id for worker in members if worker.leaving is None)
    end_job(
        job,
        "failed",
        f"worker {names} left the training loop after step {first.leaving.committed} while {waiting} went on: all workers "
        "must leave after the same step; to end training for all of them, call session.stop()",
        now,
    )
