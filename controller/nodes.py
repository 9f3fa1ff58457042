"""Nodes: how they come, how they are lost, and how they are asked to leave.

    attach -> refused, or welcomed with the workers that it may keep -> its empty places are filled
    drain  -> its members leave by a switch -> whoever is left on it is ended -> its agent is shut down -> goodbye

One agent at a time speaks for a node id. What becomes of a node's workers is `losses.py`'s and `recovering.py`'s; nobody
is ever taken into a world here.
"""

from __future__ import annotations

from controller.endings import check_outcome, let_finish, may_conclude
from controller.events import CloseAgent, Persist, ToAgent
from controller.job import Job
from controller.losses import workers_lost
from controller.places import fill_places
from controller.recovering import finish_recovering, replay, take_back
from controller.redundancy import may_leave
from controller.restoring import forget_answers
from controller.state import Node
from controller.switching import consider_switch
from elastic.domain import PROTOCOL_VERSION, AgentHello, Refused, Shutdown, Welcome

# -- coming --------------------------------------------------------------------------------------------------------


def agent_attached(job: Job, hello: AgentHello, now: float) -> None:
    """An agent opened its stream: refuse it with a sentence, or make it one of the job's nodes."""
    refusal = _refusal(job, hello)
    if refusal:
        job.emit(ToAgent(hello.incarnation, Refused(refusal)))
        job.emit(CloseAgent(hello.incarnation, refusal))
        return
    known = job.nodes.get(hello.node)
    if known is not None and known.attached:
        node_lost(job, known, "it attached anew", "stream", now)
    job.newest_generation = max(job.newest_generation, hello.highest_generation)
    node = Node(
        id=hello.node,
        incarnation=hello.incarnation,
        nproc=hello.nproc,
        pid=hello.pid,
        peer_address=hello.peer_address,
        worker_address=hello.worker_address,
        heard_at=now,
        domain=dict(hello.labels).get("domain", ""),
        island=dict(hello.labels).get("island", ""),
        data_key=hello.data_key,
        state="draining" if job.draining.get(hello.node) == hello.incarnation else "attached",
        restarts=known.restarts if known is not None else {},
    )
    job.nodes[hello.node] = node
    forget_answers(job, node.incarnation)
    keep = take_back(job, node, hello)
    job.emit(
        Persist(
            "node-attached",
            f"node {node.id} attached with {node.nproc} worker(s)" + (f", {len(keep)} of them running" if keep else ""),
            {"node": node.id, "pid": node.pid, "nproc": node.nproc},
        )
    )
    job.emit(
        ToAgent(
            node.incarnation,
            Welcome(
                keep,
                int(job.settings.failure_timeout_s * 1000),
                job.newest_generation,
                int(job.settings.hang_timeout_s * 1000),
                int(job.settings.start_timeout_s * 1000),
            ),
        )
    )
    for status in hello.workers:
        if status.worker in keep:
            replay(job, status, now)
    if job.recovering_until is not None:
        finish_recovering(job, now)
    elif job.finishing and job.concluded:
        let_finish(job, now)  # one that has come back had done what must be done once
    else:
        fill_places(job, node)


def _refusal(job: Job, hello: AgentHello) -> str:
    """Return why an agent cannot be one of the job's, or ""."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return (
            f"node {hello.node} speaks protocol version {hello.protocol_version}, this controller {PROTOCOL_VERSION}: "
            "install one version of elastic-runtime on all nodes"
        )
    if hello.job != job.settings.job:
        return (
            f"node {hello.node} belongs to job {hello.job!r}, this controller runs {job.settings.job!r}: "
            "check --controller and --job"
        )
    if job.settings.token and hello.token != job.settings.token:
        return f"node {hello.node} shows a wrong join token: start it with the token of job {job.settings.job!r}"
    if job.outcome or (job.finishing and job.recovering_until is None and not may_conclude(job)):
        return f"job {job.settings.job!r} is over: {job.reason or 'it has finished'}"
    known = job.nodes.get(hello.node)
    if known is not None and known.attached and known.incarnation != hello.incarnation:
        return f"node id {hello.node!r} is already attached (agent pid {known.pid}): give every agent its own --node-id"
    others = [n for n in job.nodes.values() if n.state == "attached" and n.id != hello.node]
    if len(others) >= job.settings.nodes_max:
        return f"the job has its {job.settings.nodes_max} nodes already: raise the MAX of --nnodes to add more"
    return ""


# -- going ---------------------------------------------------------------------------------------------------------


def node_lost(job: Job, node: Node, reason: str, detected_by: str, now: float) -> None:
    """A node cannot be reached any more; its workers may live on, but count as lost with it."""
    if not node.attached:
        return
    node.state = "lost"
    lost = [w for w in job.workers.values() if w.node == node.id and w.alive]
    job.emit(Persist("node-lost", f"node {node.id} lost: {reason}", {"node": node.id, "detected_by": detected_by}))
    if detected_by != "stream":  # otherwise it has ended, or its agent has opened another
        job.emit(CloseAgent(node.incarnation, reason))
    silent_s = now - node.heard_at if detected_by == "lease" else 0.0
    workers_lost(
        job, lost, "node lost", f"node {node.id}", reason, detected_by, now, state="lost", silent_s=silent_s
    )
    check_outcome(job, now)


def node_said_goodbye(job: Job, node: Node, reason: str, now: float) -> None:
    """An agent goes, as it was asked to or of its own accord; its workers go with it."""
    lost = [w for w in job.workers.values() if w.node == node.id and w.alive]
    drained = node.state == "draining" and not any(job.is_member(w) for w in lost)
    node.state = "left"
    job.draining.pop(node.id, None)
    job.emit(Persist("node-left", f"node {node.id} left: {reason}", {"node": node.id}))
    if drained or job.outcome or job.finishing:
        for worker in lost:
            worker.state = "left"
    else:
        workers_lost(job, lost, "node left", f"node {node.id}", reason, "goodbye", now)
    check_outcome(job, now)


# -- being asked to leave ------------------------------------------------------------------------------------------


def drain_refusal(job: Job, node_id: str) -> str:
    """Return why a node cannot be drained now, or ""."""
    node = job.nodes.get(node_id)
    if node is None or node.state in ("lost", "left"):
        known = ", ".join(sorted(n.id for n in job.nodes.values() if n.state == "attached")) or "none"
        return f"no node {node_id!r} is attached (attached: {known})"
    if not any(n.state == "attached" and n.id != node_id for n in job.nodes.values()):
        return f"node {node_id} is the last one: use `elastic stop` to end the job"
    return ""


def drain(job: Job, node_id: str, now: float) -> None:
    """A person wants a node to leave: its members do as soon as the others can go on without them."""
    if drain_refusal(job, node_id) or job.outcome:
        return
    node = job.nodes[node_id]
    node.state = "draining"
    job.draining[node_id] = node.incarnation
    job.emit(
        Persist(
            "node-draining",
            f"node {node_id} is asked to leave",
            {"node": node_id, "incarnation": node.incarnation},
        )
    )
    consider_switch(job, now)


def let_drained_go(job: Job, now: float) -> None:
    """On nodes that were asked to leave, end who is in no world, and the agent once nobody is left."""
    for node in job.nodes.values():
        if node.state != "draining" or node.shut_down:
            continue
        idle = [w for w in job.workers.values() if w.node == node.id and w.alive and not job.is_member(w)]
        for worker in idle:
            job.kill(worker, "its node is drained")
        workers_lost(job, idle, "drain", f"node {node.id}", "drained", "a person", now, state="left")
        if any(w.alive and w.node == node.id for w in job.workers.values()):
            continue
        node.waits_since = now if node.waits_since is None else node.waits_since
        if may_leave(job, node.waits_since, now):
            node.shut_down = True
            job.emit(ToAgent(node.incarnation, Shutdown("drained", 0)))
