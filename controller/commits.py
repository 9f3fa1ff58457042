"""What becomes of a generation that was opened: prepared by all, committed, adopted by all; or not to be had.

    all Prepared -> restore step = the newest committed anywhere -> ledger -> Commit g -> all Switched: it is the world

From the commit on there is no way back to the world before: the ledger has it before the first worker hears of it. Nothing
is committed that not every participant has prepared, and nobody's absence is judged here (`losses.py` does).
"""

from __future__ import annotations

from dataclasses import replace

from controller.approximating import tell_of_approximation
from controller.attempts import abandon_switch, suspect
from controller.events import Persist
from controller.job import Job
from controller.layouts import is_whole, note_committed
from controller.probing import begin_probing
from controller.redundancy import begin_vulnerable, restores_per_s, world_began
from controller.restoring import state_lost
from controller.state import Attempt, Worker
from controller.switching import consider_switch, retry_switch_later
from elastic.domain import FRESH_STEP, Commit, Finish, Plan, PlanKind, Prepared, Switched
from recovery.plan import protection_gaps


def worker_prepared(job: Job, worker: Worker, report: Prepared, now: float) -> None:
    """One more participant is prepared; the last one brings the commit about."""
    attempt = job.attempt
    if attempt is None or attempt.committed or report.generation != attempt.plan.generation:
        return
    attempt.prepared[worker.id] = report
    if not attempt.participants <= set(attempt.prepared):
        return
    plan = attempt.plan
    nodes = len({m.node for m in plan.members})
    ending = any(member.leaving for member in job.known(plan.members))
    if nodes < job.settings.nodes_min and plan.kind is PlanKind.FENCE and not ending:
        attempt.waits_for_nodes, attempt.deadline = True, now + job.settings.start_timeout_s
        job.emit(
            Persist(
                "job-waits",
                f"waiting for nodes: {nodes} left, --nnodes asks for at least {job.settings.nodes_min}",
                {},
            )
        )
        consider_switch(job, now)
        return
    holders = _holders(job, attempt)
    if not holders and plan.kind is PlanKind.SWITCH:
        abandon_switch(job, "no member holds the state yet")
        return
    if not holders and attempt.snapshot is None:
        state_lost(job, f"no survivor holds all of the state: {plan.reason}", now)
        return
    _commit(job, attempt, holders, now)


def _holders(job: Job, attempt: Attempt) -> list[Prepared]:
    """What those said who hold the state."""
    plan, reports = attempt.plan, list(_reports(attempt).values())
    assert job.spec is not None
    if job.spec.shard_optimizer and plan.kind is PlanKind.FENCE and not _need_no_optimizer(job, plan, reports):
        return []  # after a fault a part of it is nowhere, or of another step
    holders = [worker for worker, report in _reports(attempt).items() if _holds_state(job, plan, report)]
    if plan.is_recut:
        return _if_of_one_step(job, attempt)
    if plan.kind is PlanKind.FENCE and not is_whole(job, plan, holders):
        return []
    return [attempt.prepared[worker] for worker in holders]


def _if_of_one_step(job: Job, attempt: Attempt) -> list[Prepared]:
    """What the old members said, if all can go on after the same step: layers are made from those of several workers."""
    assert job.plan is not None
    reports = [report for worker, report in _reports(attempt).items() if worker in job.plan.workers()]
    restore = _restore_step(job, reports)
    can = all(report.has_state and restore in (report.committed, report.voted) for report in reports)
    return reports if can else []


def _need_no_optimizer(job: Job, plan: Plan, reports: list[Prepared]) -> bool:
    """Whether all that is still needed of a sharded state is on every worker: nothing was trained yet, or all has been."""
    newest = max(report.committed for report in reports)
    if newest == FRESH_STEP:
        return job.step_committed == FRESH_STEP
    ended = any(member.leaving for member in job.known(plan.members))
    return ended and all(report.has_state and report.committed == newest for report in reports)


def _holds_state(job: Job, plan: Plan, report: Prepared) -> bool:
    """Whether a worker holds the job's state.

    The initial one is not, in a job that has trained or begins with a checkpoint. A switch is prepared while its members
    train on, so there the numbers in a report are old.
    """
    is_initial = max(report.committed, report.voted) == FRESH_STEP
    return report.has_state and not (is_initial and job.step_committed > FRESH_STEP and plan.kind is PlanKind.FENCE)


def _reports(attempt: Attempt) -> dict[str, Prepared]:
    """What the members of the new world said, in order of rank."""
    return {member.worker: attempt.prepared[member.worker] for member in attempt.plan.members}


def _commit(job: Job, attempt: Attempt, holders: list[Prepared], now: float) -> None:
    """Commit a generation that all have prepared; `holders` are the reports of those who hold the state."""
    plan, reports, snapshot = attempt.plan, _reports(attempt), attempt.snapshot
    restore = _restore_step(job, holders) if snapshot is None else snapshot.step
    if snapshot is not None:
        given = plan.workers()
    elif plan.kind is PlanKind.SWITCH and job.plan is not None:
        given = plan.workers() - job.plan.workers()  # all others have it by the step that decides the switch
    else:
        given = frozenset(w for w, r in reports.items() if not (r.has_state and restore in (r.committed, r.voted)))
    joiners = tuple(m.rank for m in plan.members if m.worker in given)
    attempt.committed = True
    attempt.deadline = float("inf")
    before, job.plan, job.leavers, job.joiners = job.plan, plan, attempt.leavers, given
    for member in plan.members:
        job.workers[member.worker].state = "member"
        job.workers[member.worker].holds_state = reports[member.worker].has_state and member.worker not in given
    job.note_world(plan)
    note_committed(job, before, plan)
    redone = 1 if plan.kind is PlanKind.FENCE else 0  # the interrupted one, also where all have voted for it
    if snapshot is not None:
        redone = max(job.step_committed - restore + 1, 0)  # a first world may begin with a checkpoint
        job.restores += plan.kind is PlanKind.FENCE
        job.step_committed, job.restoring = restore, None  # what came after it is lost
        for worker in job.known(plan.members):
            worker.status = replace(worker.status, stable=min(worker.status.stable, restore))
    if plan.kind is PlanKind.SWITCH:
        begin_vulnerable(job, now)
    else:
        world_began(job, restore, now)
    if plan.kind is not PlanKind.SWITCH:
        job.note_step(restore, now)
        job.incidents.regrouped(plan.generation, restore, redone)
    job.emit(
        Persist(
            "generation-committed",
            f"generation {plan.generation} committed"
            + (f", continuing after step {restore}" if plan.kind is PlanKind.FENCE else "")
            + (", which all read from their agents" if snapshot is not None else "")
            + (f", {len(joiners)} joiner(s) receive the state" if joiners and snapshot is None else ""),
            {
                "generation": plan.generation,
                "restore_step": restore,
                "joiner_ranks": list(joiners),
                "snapshot_generation": snapshot.generation if snapshot is not None else 0,
            },
        )
    )
    _tell_of_gaps(job, plan)
    tell_of_approximation(job, plan, restore)
    # Whoever has seen the verdict that ends the loop knows after which step, and so do all others from now on.
    stop_after = max(report.stop_after for report in reports.values())
    captured_in = snapshot.generation if snapshot is not None else 0
    survivors = [report for worker, report in reports.items() if worker not in given]
    kept = _kept_deal(restore, survivors) if plan.kind is PlanKind.FENCE else 0
    command = Commit(plan.generation, restore, joiners, stop_after, captured_in, restores_per_s(job, now), kept)
    for worker_id in sorted(attempt.participants):
        job.tell(job.workers[worker_id], command)


def _kept_deal(restore: int, survivors: list[Prepared]) -> int:
    """Return the generation as dealt for which all survivors have the step after `restore`; 0 unless all have it so."""
    found = {report.dealt if report.committed == restore else 0 for report in survivors}
    return found.pop() if len(found) == 1 else 0


def _tell_of_gaps(job: Job, plan: Plan) -> None:
    """Say where snapshots of this world are protected less well than was asked for, or are again as they should be."""
    gaps = protection_gaps(plan, job.settings.data_shards, job.settings.parity_shards)
    if gaps != job.protection_gaps:
        job.protection_gaps = gaps
        sentence = " ".join(gaps) or "Snapshots are protected as was asked for again."
        job.emit(Persist("protection-changed", sentence, {"gaps": list(gaps)}))


def _restore_step(job: Job, holders: list[Prepared]) -> int:
    """Return the step after which all go on: the newest that anybody has committed."""
    restore = max(report.committed for report in holders)
    if restore < job.step_committed <= min(report.voted for report in holders):
        return job.step_committed  # whoever committed it is lost, but all the others can
    return restore


def worker_switched(job: Job, worker: Worker, report: Switched, now: float) -> None:
    """One more member is in the new world; with the last one, whoever leaves may go."""
    generation = report.generation
    attempt = job.attempt
    if attempt is None or not attempt.committed or attempt.plan.generation != generation:
        return
    attempt.switched.add(worker.id)
    if not attempt.plan.workers() <= attempt.switched:
        return
    # All who stay are past the step that decided the switch, so nothing is needed from those who leave.
    job.attempt, job.leavers = None, ()
    if job.suspicion is not None and job.suspicion.generation < generation:
        job.suspicion = None  # nobody needs the world that broke any more
    if attempt.plan.kind is PlanKind.SWITCH:
        world_began(job, report.committed, now)
        job.emit(
            Persist(
                "generation-adopted",
                f"generation {generation} is adopted by all",
                {"generation": generation, "step": report.committed},
            )
        )
    for member in attempt.leavers:
        job.tell(job.workers[member.worker], Finish("drained"))
        job.workers[member.worker].state = "left"
    consider_switch(job, now)


def prepare_failed(job: Job, worker: Worker, generation: int, reason: str, now: float) -> None:
    """A participant could not build its group: a switch waits for another time, any other generation is suspect."""
    attempt = job.attempt
    if attempt is None or attempt.committed or attempt.plan.generation != generation:
        return
    if attempt.plan.kind is PlanKind.SWITCH:
        nodes = {member.node for member in attempt.plan.members}
        abandon_switch(job, f"worker {worker.id} could not build its group: {reason}")
        retry_switch_later(job)
        begin_probing(job, nodes, f"the group of generation {generation} could not be built", now, then_fence=False)
    else:
        suspect(
            job, generation, f"worker {worker.id} could not build the group of generation {generation}: {reason}", now
        )
