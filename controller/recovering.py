"""A controller that begins from its ledger, and the wait for agents that may come back with what they hold.

    restart, or no holder of the state can be reached -> recovering: agents attach, their workers are taken back -> every
    member's node has spoken, or its time is up -> the world is left alone if it is intact, else fenced

While `recovering_until` is set nothing is decided: what is heard is only noted. A part that finds it set must leave the
decision to `finish_recovering`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from controller.attempts import suspect
from controller.endings import check_finished, check_outcome, let_finish, may_conclude
from controller.events import Persist
from controller.fencing import fence
from controller.founding import admit_joiner, found_if_complete
from controller.job import Job
from controller.layouts import note_plan
from controller.places import fill_places
from controller.redundancy import world_began
from controller.restoring import state_lost
from controller.state import Node, Worker
from controller.switching import consider_switch
from elastic.domain import (
    AgentHello,
    CollectiveFailed,
    Concluded,
    Failed,
    Leaving,
    Member,
    Plan,
    PlanKind,
    Registered,
    Warm,
    WorkerStatus,
)


def restore_from_ledger(job: Job, records: Iterable[tuple[str, Mapping[str, Any]]], now: float) -> None:
    """Rebuild a job that knows nothing yet from what was persisted, and let it wait for its agents.

    `records` are (kind, data) in order; data holds the values that Persist was given.
    """
    opened: dict[int, tuple[Plan, tuple[Member, ...]]] = {}
    accounts: Mapping[str, Any] | None = None
    for kind, data in records:
        accounts = data.get("accounts", accounts)
        match kind:
            case "job-fixed":
                job.spec, job.requested = data["spec"], data["requested"]
            case "worker-started":
                key = (data["node"], data["local_rank"])
                job.serials[key] = max(job.serials.get(key, 0), data["serial"])
            case "generation-opened":
                plan: Plan = data["plan"]
                before = job.plan.members if job.plan is not None else ()
                opened[plan.generation] = plan, tuple(m for m in before if m.worker in data["leavers"])
                job.newest_generation = max(job.newest_generation, plan.generation)
            case "generation-committed":
                older, (job.plan, job.leavers) = job.plan, opened[data["generation"]]
                job.note_world(job.plan)
                note_plan(job, older, job.plan)  # whether its layers have arrived nobody has written down
                job.joiners = frozenset(job.plan.members[rank].worker for rank in data["joiner_ranks"])
                if data.get("snapshot_generation"):
                    job.restores += job.plan.kind is PlanKind.FENCE
                    job.step_committed = data["restore_step"]  # what came after it is lost
                job.step_committed = max(job.step_committed, data["restore_step"])
                world_began(job, data["restore_step"], now)  # whether it has a safe snapshot by now is looked at anew
            case "approximated":
                job.approximations.append(data["words"])
                job.approximated.update(data.get("stages", ()))
            case "approximation-judged":
                job.approximations[-1] = data["words"]
            case "generation-adopted":
                job.leavers = ()
                job.protected_after = data["step"]
            case "training-began":
                job.step_committed = max(job.step_committed, data["step"])
            case "job-unfounded":
                job.plan, job.leavers = None, ()
            case "checkpoint-looked":
                job.looked = not data["path"]  # what was found is read by the world that begins with it, or is looked for again
                job.saved_step, job.saved_path = data["step"], data["path"]
            case "checkpoint-saved":
                job.saved_step, job.saved_path = data["step"], data["path"]
            case "redundancy-restored":
                job.vulnerable_s += data["seconds"]
                job.vulnerable_since = None
            case "node-draining":
                job.draining[data["node"]] = data["incarnation"]
            case "node-left":
                job.draining.pop(data["node"], None)
            case "incident":
                job.incidents.restore(data["incident"], data.get("phases", {}))
            case "evidence":
                job.incidents.restore_number(data["incident"])
            case "loop-ended":
                job.finishing, job.digest = True, data["digest"]
                job.step_committed, job.samples = data["step"], data["samples"]
                job.concludes = data["concludes"]
            case "concluding":
                job.concluder = data["worker"]
            case "job-concluded":
                job.concluded = True
            case "job-ended":
                job.outcome, job.reason = data["outcome"], data["reason"]
    job.started_at = job.founding_since = now
    job.restarted = True
    if accounts is not None:
        job.accounts.restore(accounts)
        if not job.outcome:
            job.accounts.went_away(now + job.unix_offset_s - accounts["unix_s"])
    all_is_done = job.finishing and (job.concluded or not job.concludes)
    patience_s = job.settings.failure_timeout_s if all_is_done else job.settings.start_timeout_s
    job.recovering_until = now + patience_s


def take_back(job: Job, node: Node, hello: AgentHello) -> tuple[str, ...]:
    """Return the workers that a (re)attached agent may keep.

    None, unless nothing has been decided since it was last heard: it comes to a controller that waits for agents. Or unless
    they may be needed to do what must be done once after the loop.
    """
    members = {member.worker for member in job.last_members()}
    keep: list[str] = []
    for status in hello.workers:
        known = job.workers.get(status.worker)
        if status.exited or (known is not None and known.state != "lost"):
            continue
        if job.recovering_until is None:
            is_cut = job.spec is not None and job.spec.is_pipeline  # then each has the digest of its own layers
            wanted = may_conclude(job) and any(
                isinstance(m, Leaving) and (is_cut or m.digest == job.digest) for m in status.messages
            )
        else:
            wanted = not status.generation or status.worker in members  # else a newer world has left it out
        if wanted:
            worker = Worker(id=status.worker, node=node.id, local_rank=status.local_rank)
            worker.pid, worker.status = status.pid, replace(status, messages=())
            job.workers[worker.id] = worker
            keep.append(worker.id)
    for worker in job.workers.values():
        if worker.node == node.id and worker.state == "lost":
            worker.state = "dead"  # its agent is here and does not have it, or ends it now
    return tuple(keep)


def replay(job: Job, status: WorkerStatus, now: float) -> None:
    """Take up what a worker said while there was no controller; nothing is decided yet."""
    worker = job.workers.get(status.worker)
    if worker is None:
        return
    member = any(m.worker == worker.id for m in job.last_members())
    if member:
        worker.state = "member"
        worker.holds_state = status.committed > 0 or worker.id not in job.joiners
    for message in status.messages:
        match message:
            case Registered(spec):
                worker.spec = spec
                if not member:
                    worker.state = "registered"
            case Warm():
                if not member:
                    worker.state = "warm"
            case CollectiveFailed(generation):
                if job.plan is not None and generation == job.plan.generation:
                    suspect(job, generation, f"worker {worker.id}: {message.reason}", now)
            case Leaving():
                worker.leaving = message
                job.note_step(message.committed, now)
                job.samples = max(job.samples, message.samples)
            case Concluded():
                job.concluded = job.finishing
            case Failed():
                worker.failure = message
            case _:
                pass
    job.note_step(status.committed, now)


def finish_recovering(job: Job, now: float) -> None:
    """Act again once every member's node has spoken, or its time is up."""
    assert job.recovering_until is not None
    members = job.last_members()
    here = {node.id for node in job.nodes.values() if node.attached}
    until = job.recovering_until
    is_cut = job.spec is not None and job.spec.holds_parts
    if is_cut and not job.restarted and here <= job.waits_with and now < until:
        return  # what is here was not enough
    if any(worker.alive and worker.holds_state for worker in job.known(members)):
        # With one of them here, the others have as long as a lease.
        job.returned_at = now if job.returned_at is None else job.returned_at
        until = min(until, job.returned_at + job.settings.failure_timeout_s)
    else:
        job.returned_at = None
    if now < until and (not here or any(m.node not in here for m in members)):
        return
    for member in members:
        worker = job.workers.setdefault(
            member.worker, Worker(member.worker, member.node, member.local_rank, state="dead")
        )
        if not worker.alive:
            # One whose node is away may yet be taken back, should all others be lost before the next commit.
            worker.state = "lost" if member.node not in here and now < job.recovering_until else "dead"
    why = "the controller restarted" if job.restarted else "nodes that hold the state came back"
    if job.restarted:
        job.accounts.came_back(job.step_committed)
        job.emit(Persist("controller-restarted", f"controller restarted at generation {job.newest_generation}", {}))
    job.restarted = False
    job.recovering_until = None
    if job.finishing:
        let_finish(job, now)
    if check_finished(job, now):
        return
    _regroup(job, why, now)
    for worker in job.workers.values():
        if worker.state == "registered" and job.plan is not None:
            admit_joiner(job, worker)
    for node in list(job.nodes.values()):
        fill_places(job, node)
    check_outcome(job, now)
    found_if_complete(job, now)
    consider_switch(job, now)


def _regroup(job: Job, why: str, now: float) -> None:
    """Fence the newest committed world unless it is intact, and all in it are where the ledger ends."""
    plan, members = job.plan, job.known(job.last_members())
    if plan is None:
        return
    gone = [w.id for w in members if not w.alive]
    if len(gone) == len(members):
        state_lost(job, "no member of the last world is left", now)
    elif (
        gone
        or job.newest_generation != plan.generation
        or job.leavers
        or any(w.status.generation != plan.generation for w in members)
    ):
        reason = why + (f"; lost meanwhile: {', '.join(gone)}" if gone else "")
        if not job.incidents.has_open:
            job.open_incident("controller restarted", "controller", "ledger", reason, now)
        fence(job, reason, now, loss=True)
