"""Inquiries: where every worker of the job was when one of them was about to be taken for lost.

    an agent suspects a worker, or all wait too long -> CollectEvidence to every agent -> EvidenceCollected from each, or its
    time is up -> an incident about the same worker opens -> its bundle is kept

Suspicion comes before the limit, by as much time as an inquiry may take, so that no loss is acted on later for it. Where nothing
is lost after all, what was found is forgotten. Nothing here decides who is lost, and nothing waits for an inquiry.
"""

from __future__ import annotations

from controller.events import KeepEvidence, Persist, ToAgent
from controller.job import Job
from controller.state import Inquiry, Node, natural
from elastic.domain import CollectEvidence, EvidenceCollected, Incident
from monitoring.hangs import EVIDENCE_TIMEOUT_S
from monitoring.stacks import examine

ANSWERS_BYTES_MAX = 64 * 1024 * 1024  # of all agents together
ANSWER_BYTES_MAX = 2 * 1024 * 1024  # of one: a message of the control plane may have twice as many
WORLD = "the world"
"""The subject of incidents that are nobody's."""


def begin_inquiry(job: Job, subject: str, now: float) -> None:
    """Look at all workers for the sake of one that may be lost; if that is being done, for this one's sake, too."""
    inquiry = job.inquiry
    if inquiry is not None and not inquiry.is_over:
        inquiry.subjects.add(subject)
        return
    workers = [worker for worker in job.workers.values() if worker.alive and worker.pid]
    nodes = sorted({worker.node for worker in workers})
    asked = {node: job.nodes[node].incarnation for node in nodes if job.nodes[node].attached}
    if not asked or job.outcome:
        return
    job.inquiries += 1
    expected = frozenset(worker.id for worker in workers)
    job.inquiry = Inquiry(job.inquiries, {subject}, expected, asked, now + EVIDENCE_TIMEOUT_S, now + _kept_s(job))
    size_bytes = min(ANSWER_BYTES_MAX, ANSWERS_BYTES_MAX // len(asked))
    order = CollectEvidence(job.inquiries, int(EVIDENCE_TIMEOUT_S * 1000), size_bytes)
    for incarnation in asked.values():
        job.emit(ToAgent(incarnation, order))


def _kept_s(job: Job) -> float:
    """For how long an incident may claim what was found: until the slowest way to one has been gone."""
    return EVIDENCE_TIMEOUT_S + 3 * job.settings.failure_timeout_s


def take_evidence(job: Job, node: Node, answer: EvidenceCollected) -> None:
    """Note what an agent found; late answers are dropped."""
    inquiry = job.inquiry
    if inquiry is not None and answer.inquiry == inquiry.number and not inquiry.is_over and node.id in inquiry.asked:
        inquiry.answers[node.id] = answer


def check_inquiry(job: Job, now: float) -> None:
    """End an inquiry once all have answered or its time is up, and keep it for the incidents that it is about."""
    inquiry = job.inquiry
    if inquiry is None:
        return
    inquiry.is_over |= len(inquiry.answers) == len(inquiry.asked) or now >= inquiry.deadline
    if inquiry.is_over:
        for incident in inquiry.claims:
            _keep(job, inquiry, incident)
        inquiry.claims.clear()
    if now > inquiry.forget_at:
        job.inquiry = None


def _keep(job: Job, inquiry: Inquiry, incident: Incident) -> None:
    evidence = [worker for node in inquiry.asked if node in inquiry.answers for worker in inquiry.answers[node].workers]
    silent = tuple(sorted(inquiry.workers - {each.worker for each in evidence}, key=natural))
    examination = examine(evidence, silent)
    found = "; ".join(str(finding) for finding in examination.findings) or "all workers are in the same place"
    job.emit(
        Persist(
            "evidence",
            f"incident {incident.number}: {found}",
            {"incident": incident.number, "findings": [str(finding) for finding in examination.findings]},
        )
    )
    answers = tuple(inquiry.answers[node] for node in inquiry.asked if node in inquiry.answers)
    nodes = tuple(node for node in inquiry.asked if node in inquiry.answers)
    job.emit(KeepEvidence(incident, nodes, answers, silent, examination))
