"""Bringing the state back from the nodes' memory or from a checkpoint, when no worker that holds it can be reached.

    no holder left -> every agent says which snapshots it holds -> the recovery ladder chooses -> the agents assemble what
    was chosen, while new workers start and warm up -> FENCE with all of them -> `commits.py`: each reads the state from
    its agent

A loss on the way begins it again; what is read lies as it was. What can be had is `recovery/ladder.py`'s to say, not decided
here, and nothing here judges why the state was lost.
"""

from __future__ import annotations

import math

from controller.approximating import rebuild
from controller.attempts import open_generation, site_of
from controller.endings import end_job
from controller.events import Persist, ToAgent
from controller.job import Job
from controller.state import Node, Restoring, natural
from elastic.domain import (
    NO_STEP,
    AssembleSnapshot,
    CheckpointFound,
    FindCheckpoint,
    FindSnapshots,
    Plan,
    PlanKind,
    SliceSource,
    SnapshotAssembled,
    SnapshotsFound,
)
from elastic.snapshots import SnapshotId
from recovery.ladder import Holding, Restore, Rung, SnapshotWorld, choose_restore
from recovery.plan import protection_groups

FAILURES_MAX = 5  # searches in a row whose choice no agent could assemble
REFUSALS_MAX = 2  # so often all may refuse a snapshot that they said they hold, before an older one is taken


def state_lost(job: Job, reason: str, now: float) -> None:
    """Nobody who holds the state can be reached: wait for nodes that have it, bring it back, or give it up."""
    job.attempt, job.suspicion, job.restoring = None, None, None
    members = job.known(job.last_members())
    away = [worker for worker in members if worker.state == "lost"]
    # A world of which nobody is known to be dead may be whole, and training on where it cannot be reached.
    if away and len(away) == len(members):
        _wait_for_nodes(job, reason, now)
    elif job.step_committed > 0 and _may_search(job) and job.failed_searches < FAILURES_MAX:
        _search(job, reason, now)
    elif away:
        _wait_for_nodes(job, reason, now)
    elif _may_search(job):
        _give_up(job, reason, f"no agent could restore what was found, {FAILURES_MAX} times in a row", now)
    else:
        _give_up(job, reason, "no snapshot was taken", now)


def _may_search(job: Job) -> bool:
    return bool(job.settings.snapshot_every or job.settings.checkpoint_target)


def _wait_for_nodes(job: Job, reason: str, now: float) -> None:
    job.restoring = None
    job.recovering_until = now + job.settings.start_timeout_s
    job.waits_with = frozenset(node.id for node in _here(job))
    job.emit(
        Persist("job-waits", f"no worker that holds the state can be reached ({reason}): waiting for its node", {})
    )


def _search(job: Job, reason: str, now: float) -> None:
    job.searches += 1
    job.restoring = Restoring(job.searches, reason, now)
    job.emit(Persist("restoring", f"no worker holds the state any more ({reason}): looking for snapshots", {}))
    check_restoring(job, now)


def _give_up(job: Job, reason: str, obstacle: str, now: float) -> None:
    """The state cannot be had any more; begin again if nothing was trained, else end the job."""
    job.restoring = None
    if job.step_committed == 0:
        job.plan, job.leavers, job.founding_since = None, (), now
        job.emit(Persist("job-unfounded", f"nothing was trained yet, so the first world forms anew: {reason}", {}))
        for worker in job.workers.values():
            if worker.alive and worker.spec is not None:
                job.kill(worker, "the first world forms anew")
        return
    end_job(
        job,
        "failed",
        f"every copy of the training state was lost after step {job.step_committed} ({reason}); "
        + obstacle.removesuffix(".")
        + "; the job must be started again"
        + (" from step 0" if job.saved_step == NO_STEP else ""),
        now,
        job.last_failure(),
    )


# -- what the agents answer ----------------------------------------------------------------------------------------


def take_found(job: Job, node: Node, answer: SnapshotsFound, now: float) -> None:
    """An agent has said what it holds."""
    restoring = job.restoring
    if restoring is not None and answer.search == restoring.number and restoring.choice is None:
        restoring.found[node.incarnation] = answer.holdings
        check_restoring(job, now)


def take_assembled(job: Job, node: Node, answer: SnapshotAssembled, now: float) -> None:
    """An agent has made the chosen snapshot readable for its workers, or could not."""
    restoring = job.restoring
    if restoring is None or answer.search != restoring.number or restoring.choice is None:
        return
    if answer.refusal:
        restoring.refusals[node.incarnation] = answer.refusal
        job.emit(Persist("snapshot-refused", f"node {node.id} cannot restore: {answer.refusal}", {"node": node.id}))
    else:
        restoring.assembled.add(node.incarnation)
    check_restoring(job, now)


def forget_answers(job: Job, incarnation: str) -> None:
    """An agent attached anew: what it was asked, or has answered, may be lost."""
    restoring = job.restoring
    if restoring is not None:
        for answers in (restoring.asked, restoring.ordered, restoring.assembled):
            answers.discard(incarnation)
        restoring.refusals.pop(incarnation, None)
        if restoring.looks_in == incarnation:
            restoring.looks_in = ""


# -- deciding ------------------------------------------------------------------------------------------------------


def check_restoring(job: Job, now: float) -> None:
    """Take the next step of a restoration, if everything for it is there."""
    restoring = job.restoring
    if restoring is None or job.outcome or job.attempt is not None or job.recovering_until is not None:
        return
    if job.plan is None:
        return  # a first world: `founding.py` waits for it
    if now - restoring.since > job.settings.start_timeout_s:
        here = [node for node in _here(job) if node.state == "attached"]
        cold = [w.id for w in job.workers.values() if w.alive and w.state not in ("warm", "member")]
        end_job(
            job,
            "failed",
            f"no world formed within --start-timeout {job.settings.start_timeout_s:.0f} s to go on from a snapshot: "
            f"{len(here)} node(s) attached, --nnodes MIN is {job.settings.nodes_min}"
            + (f", not ready: {', '.join(cold)}" if cold else "")
            + "; start the missing agents",
            now,
        )
    elif restoring.choice is None:
        _ask(job, restoring)
        _choose(job, restoring, now)
    else:
        _order(job, restoring, restoring.choice)
        _open_if_ready(job, restoring, restoring.choice, now)


def _here(job: Job) -> list[Node]:
    return sorted((node for node in job.nodes.values() if node.attached), key=lambda node: natural(node.id))


def _ask(job: Job, restoring: Restoring) -> None:
    for node in _here(job):
        if node.incarnation not in restoring.asked:
            restoring.asked.add(node.incarnation)
            job.emit(ToAgent(node.incarnation, FindSnapshots(restoring.number)))


def _choose(job: Job, restoring: Restoring, now: float) -> None:
    here = _here(job)
    missing = [node for node in here if node.incarnation not in restoring.found]
    if missing:
        return  # an agent that is here answers, or its lease lapses
    holdings = [
        Holding(node.id, SnapshotId(held.step, held.generation), held.slices, held.parity)
        for node in here
        for held in restoring.found.get(node.incarnation, ())
    ]
    refused = [snapshot for snapshot, count in job.refused.items() if count >= REFUSALS_MAX]
    saved = job.saved_step if job.settings.checkpoint_target and job.saved_step != NO_STEP else None
    choice = choose_restore(
        holdings, _worlds(job), committed=job.step_committed, checkpoint_step=saved, refused=refused
    )
    # A member's agent whose stream was only reset is back at once, and may have a newer snapshot.
    may_return = any(w.state == "lost" for w in job.known(job.last_members()))
    redone_s = math.inf
    if choice.snapshot is not None:
        redone_s = (job.step_committed - choice.snapshot.step) * job.steps.median_s()
    waited_s = now - restoring.since
    if (may_return or not here) and waited_s < min(redone_s, job.settings.failure_timeout_s):
        return
    if choice.snapshot is not None:
        _decide(job, restoring, choice, choice.snapshot, "", now)
        return
    reason = choice.reason
    if job.settings.approximate:
        obstacle = rebuild(job, f"{restoring.reason}; {choice.reason}", now)
        if not obstacle:
            return
        reason = f"Nothing can be made from other layers: {obstacle}. {choice.reason}"
    if choice.rung is Rung.CHECKPOINT:
        restoring.passed_over = reason
        look_for_checkpoint(job, restoring)
    elif may_return:
        _wait_for_nodes(job, f"{restoring.reason}; {reason}", now)
    else:
        _give_up(job, restoring.reason, reason, now)


def _decide(
    job: Job, restoring: Restoring, choice: Restore, snapshot: SnapshotId, checkpoint: str, now: float
) -> None:
    restoring.choice, restoring.snapshot, restoring.checkpoint, restoring.chosen_at = choice, snapshot, checkpoint, now
    job.emit(Persist("snapshot-chosen", choice.reason, {"step": snapshot.step}))
    _order(job, restoring, choice)


def look_for_checkpoint(job: Job, restoring: Restoring) -> None:
    """Have one agent look for the newest whole checkpoint; another one if it goes away meanwhile."""
    here = _here(job)
    if here and job.node_of(restoring.looks_in) is None:
        restoring.looks_in = here[0].incarnation
        job.emit(ToAgent(restoring.looks_in, FindCheckpoint(restoring.number, job.settings.checkpoint_target)))


def take_checkpoint(job: Job, node: Node, answer: CheckpointFound, now: float) -> None:
    """An agent has looked for the newest checkpoint."""
    restoring = job.restoring
    if restoring is None or answer.search != restoring.number or restoring.choice is not None:
        return
    for sentence in answer.passed_over:
        job.emit(Persist("checkpoint-passed-over", sentence, {}))
    if answer.refusal:
        end_job(job, "failed", answer.refusal, now)
        return
    if job.plan is None:
        job.looked = True
        if answer.path:
            job.saved_step, job.saved_path = answer.step, answer.path
        found = answer.path or "no checkpoint to begin with"
        job.emit(Persist("checkpoint-looked", found, {"step": job.saved_step, "path": answer.path}))
    if not answer.path and job.plan is None:
        job.restoring = None
    elif not answer.path:
        _give_up(job, restoring.reason, f"no whole checkpoint is left at {job.settings.checkpoint_target}", now)
    else:
        reason = f"The checkpoint of step {answer.step} is read: {answer.path}."
        if restoring.passed_over:
            found = answer.path if answer.step == job.saved_step else f"that of step {answer.step}, {answer.path}"
            reason = f"{restoring.passed_over} The newest whole one is {found}."
        choice = Restore(Rung.CHECKPOINT, None, (), (), reason)
        _decide(job, restoring, choice, SnapshotId(answer.step, answer.generation), answer.path, now)


def begin_with_checkpoint(job: Job, now: float) -> bool:
    """Whether the first world must wait for what a checkpoint holds; looks for one before anything is founded."""
    if not job.settings.checkpoint_target or job.plan is not None:
        return False
    if not job.looked and job.restoring is None:
        job.searches += 1
        job.restoring = Restoring(job.searches, "the job begins", now)
    restoring = job.restoring
    if restoring is None:
        return False
    if restoring.choice is None:
        look_for_checkpoint(job, restoring)
        return True
    _order(job, restoring, restoring.choice)
    if restoring.refusals:
        end_job(job, "failed", "; ".join(restoring.refusals.values()), now)
        return True
    return not {node.incarnation for node in _here(job)} <= restoring.assembled


def _order(job: Job, restoring: Restoring, choice: Restore) -> None:
    """Have every agent that is here make the chosen snapshot readable for its workers."""
    snapshot, here = restoring.snapshot, _here(job)
    assert snapshot is not None
    world = Plan() if restoring.checkpoint else job.worlds[snapshot.generation]
    order = AssembleSnapshot(
        search=restoring.number,
        step=snapshot.step,
        generation=snapshot.generation,
        slices=1 if restoring.checkpoint else world.world_size,
        sources=tuple(SliceSource(index, node) for index, node in choice.sources),
        decoded=choice.decoded,
        world=world,
        nodes=tuple(site_of(node) for node in here),
        checkpoint=restoring.checkpoint,
        target=job.settings.checkpoint_target,
    )
    for node in here:
        if node.incarnation not in restoring.ordered:
            restoring.ordered.add(node.incarnation)
            job.emit(ToAgent(node.incarnation, order))


def _worlds(job: Job) -> list[SnapshotWorld]:
    worlds = []
    for generation, plan in job.worlds.items():
        slices = tuple((member.node, member.rank) for member in plan.members)
        worlds.append(SnapshotWorld(generation, slices, protection_groups(plan)))
    return worlds


def _needed(job: Job) -> list[Node]:
    """The nodes that the next world is made of: those that are to leave only if it cannot be without them."""
    here = _here(job)
    staying = [node for node in here if node.state == "attached"]
    return staying if len(staying) >= job.settings.nodes_min else here


def _open_if_ready(job: Job, restoring: Restoring, choice: Restore, now: float) -> None:
    """Open the world that goes on, once everybody who is expected has warmed up."""
    assert job.spec is not None
    here = _needed(job)
    if here and all(node.incarnation in restoring.refusals for node in here):
        job.failed_searches += 1
        if restoring.snapshot is not None:
            job.refused[restoring.snapshot] = job.refused.get(restoring.snapshot, 0) + 1
        state_lost(job, "; ".join(restoring.refusals.values()), now)
        return
    able = [node for node in here if node.incarnation not in restoring.refusals]
    if len(able) < min(len(here), job.settings.nodes_min):
        job.failed_searches += 1  # some have all of it by now, and the others can read it there
        state_lost(job, "; ".join(restoring.refusals.values()), now)
        return
    ready = {node.id for node in able if node.incarnation in restoring.assembled}
    # Members that live and hold nothing, since the world that was to give it to them never did, are as good as warm ones.
    waits = now - restoring.chosen_at < job.settings.join_timeout_s
    states = ("warm", "member") if waits else ("warm", "member", "warming", "registered")
    warm = [w for w in job.workers.values() if w.state in states and w.node in ready]
    warm.sort(key=lambda w: (natural(w.node), w.local_rank))
    if not warm or len({w.node for w in warm}) < job.settings.nodes_min:
        return
    if waits and len(warm) < sum(node.nproc for node in able):
        return
    members = [w.id for w in warm][: job.spec.seats]
    open_generation(job, PlanKind.FENCE, members, choice.reason, now, snapshot=restoring.snapshot)
