"""How a controller comes to know where all workers were, and what it keeps of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controller.bundles import BUNDLES_KEPT, Bundles
from controller.events import AgentSaid, ControllerEffect, KeepEvidence, ToAgent
from controller.inquiring import ANSWERS_BYTES_MAX
from elastic.domain import (
    CollectEvidence,
    Event,
    EvidenceCollected,
    Heartbeat,
    StackFrame,
    StatusReply,
    Suspected,
    ThreadStack,
    WorkerEvidence,
    WorkerExited,
    WorkerStatus,
)
from elastic.errors import ConfigError
from tests.unit.controllers import A, B, Job

STUCK = ThreadStack(1, "", True, (StackFrame("load", "/me/train.py", 5, "lock.acquire()", True),))


class Inquired(Job):
    """A world of two nodes, of which the second one's worker gets stuck, and the evidence that was kept."""

    def __init__(self, **settings: float) -> None:
        super().__init__(**settings)
        self.kept: list[KeepEvidence] = []
        self.orders: dict[str, CollectEvidence] = {}
        self.running("n0", "n1")
        for number, worker in enumerate((A, B)):
            self.machine.workers[worker].pid = number + 1

    def perform(self, effect: ControllerEffect) -> None:
        match effect:
            case KeepEvidence():
                self.kept.append(effect)
            case ToAgent(incarnation, CollectEvidence() as order):
                self.orders[incarnation] = order

    def suspect(self) -> None:
        self.feed(AgentSaid("n1#1", Suspected(B, "no progress for 9.0 s", "progress")))

    def answer(self, node: str, worker: str, *, waits: bool, inquiry: int = 1) -> None:
        found = WorkerEvidence(worker, 1, "R", "user code", 4, 1, waits, 9.0, () if waits else (STUCK,))
        self.feed(AgentSaid(f"{node}#1", EvidenceCollected(inquiry, (found,), (("python", "3"),))))

    def lose(self, worker: str = B) -> None:
        node = worker.split("/")[0]
        self.feed(AgentSaid(f"{node}#1", WorkerExited(worker, -9, "no progress for 10.0 s", False, "progress", 10.0)))


def test_all_are_asked_once_and_what_they_say_is_kept_with_the_incident() -> None:
    job = Inquired()
    job.suspect()
    job.suspect()
    assert job.orders == {f"{node}#1": CollectEvidence(1, 1000, 2 << 20) for node in ("n0", "n1")}
    job.answer("n0", A, waits=True)
    job.answer("n1", B, waits=False)
    assert job.kept == [], "nothing is lost yet"
    job.lose()
    (kept,) = job.kept
    assert kept.incident.number == 1 and kept.incident.subject == f"worker {B}" and kept.silent == ()
    (finding,) = kept.examination.findings
    assert finding.worker == B and "lock.acquire()" in finding.place
    kind, data = next(record for record in job.ledger if record[0] == "evidence")
    assert data["incident"] == 1 and kind == "evidence"
    assert job.restarted().machine.incidents.total == 1, "the number is not given twice"


def test_whoever_does_not_answer_in_time_is_silent_and_delays_nothing() -> None:
    job = Inquired()
    job.suspect()
    job.answer("n0", A, waits=True)
    job.lose()
    assert job.machine.attempt is not None and job.machine.attempt.plan.generation == 2, "the fence waits for nothing"
    assert job.kept == []
    job.tick(1.5)
    (kept,) = job.kept
    assert kept.silent == (B,) and kept.nodes == ("n0",)
    job.answer("n1", B, waits=False)
    assert len(job.kept) == 1


def test_what_was_found_for_nothing_is_forgotten_and_no_other_incident_claims_it() -> None:
    job = Inquired()
    job.suspect()
    job.answer("n0", A, waits=True)
    job.answer("n1", B, waits=True)
    job.lose(A)
    assert job.kept == []
    job.tick(8.0)
    assert job.machine.inquiry is None


def test_a_later_suspicion_is_looked_into_anew() -> None:
    job = Inquired()
    job.suspect()
    job.answer("n0", A, waits=True)
    job.answer("n1", B, waits=True)
    job.suspect()
    assert {order.inquiry for order in job.orders.values()} == {2}
    job.answer("n0", A, waits=True, inquiry=1)
    assert job.machine.inquiry is not None and not job.machine.inquiry.answers, "that was the first inquiry's"


def test_a_world_that_stands_still_is_looked_into_before_it_is_fenced() -> None:
    job = Inquired(hang_timeout_s=6.0)
    for node, worker in (("n0", A), ("n1", B)):
        status = WorkerStatus(worker, pid=1, generation=1, committed=3, progress=9, waits=True)
        job.feed(AgentSaid(f"{node}#1", Heartbeat(1, (status,))))
    began = job.now
    while not job.kept:
        assert job.now < began + 10
        job.tick(0.5)
        if job.orders and job.machine.inquiry is not None and not job.machine.inquiry.is_over:
            assert job.machine.suspicion is None, "nobody has been fenced yet"
            job.answer("n0", A, waits=True)
            job.answer("n1", B, waits=True)
        if job.machine.probing is not None:
            job.probed()
    assert (job.kept[0].incident.kind, job.kept[0].silent) == ("collective broken", ())


def test_ten_thousand_agents_may_say_where_their_main_threads_are() -> None:
    assert ANSWERS_BYTES_MAX // 10_000 > 4096


# -- bundles -------------------------------------------------------------------------------------------------------


def evidence() -> KeepEvidence:
    job = Inquired()
    job.suspect()
    job.answer("n0", A, waits=True)
    job.answer("n1", B, waits=False)
    job.lose()
    return job.kept[0]


def test_a_bundle_says_what_was_found(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path / "incidents")
    folder = bundles.write(evidence(), StatusReply(job="j"), [Event(1, 0.0, "k", "text", "{}")])
    assert sorted(path.name for path in (tmp_path / "incidents").iterdir()) == ["1"], "nothing is left beside it"
    assert "lock.acquire()" in (folder / "stacks" / "n1-0.1.txt").read_text()
    assert json.loads((folder / "versions.json").read_text()) == {"n0": {"python": "3"}, "n1": {"python": "3"}}
    assert json.loads((folder / "ledger.jsonl").read_text())["text"] == "text"
    reply = bundles.read(1, 1)
    assert reply.path == str(folder) and "while others wait" in reply.summary
    assert json.loads(reply.json)["findings"][0]["worker"] == B
    assert bundles.write(evidence(), StatusReply(), []) == folder, "a second one of the same number replaces it"


def test_the_newest_bundles_stay(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path)
    for number in range(1, BUNDLES_KEPT + 1):
        (tmp_path / str(1000 + number)).mkdir()
    bundles.write(evidence(), StatusReply(), [])
    assert len(bundles.numbers()) == BUNDLES_KEPT


@pytest.mark.parametrize(
    ("number", "total", "words"),
    [(3, 2, "no incident 3: its incidents are 1 to 2"), (1, 0, "it has had none"), (2, 2, "no evidence of incident 2")],
)
def test_a_bundle_that_is_not_there_is_said_to_be_missing(tmp_path: Path, number: int, total: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Bundles(tmp_path).read(number, total)
