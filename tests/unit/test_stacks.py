"""Who is named when a world stands still, out of what all workers were seen at."""

from __future__ import annotations

from elastic.domain import StackFrame, ThreadStack, WorkerEvidence
from monitoring.stacks import FINDINGS_MAX, GROUPS_MAX, examine, group, similarity

MAIN = StackFrame("main", "/home/me/train.py", 10, "optimizer.step()", True)
STEP = StackFrame("step", "/lib/torch/optim.py", 20)
REDUCE = StackFrame("reduce", "/lib/elastic/reduction.py", 30)
LOCK = StackFrame("load", "/home/me/train.py", 57, "lock.acquire()", True)


def seen(
    worker: str, *frames: StackFrame, operation: str = "the reduction", step: int = 7, waits: bool = True, state: str = "R",
    since_s: float = 0.0, more: tuple[ThreadStack, ...] = (),
) -> WorkerEvidence:  # fmt: skip
    stack = ThreadStack(1, "MainThread", True, frames)
    return WorkerEvidence(worker, 1, state, operation, step, 0, waits, since_s, (stack, *more) if frames else ())


def waiting(worker: str, line: int = 30) -> WorkerEvidence:
    return seen(worker, StackFrame("wait", "/lib/elastic/group.py", line), REDUCE, STEP, *([STEP] * 8), MAIN)


def test_whoever_does_not_wait_is_what_the_others_wait_for() -> None:
    found = examine([waiting("a"), seen("b", LOCK, MAIN, operation="user code", waits=False, since_s=9.0), waiting("c")])
    (finding,) = found.findings
    assert finding.worker == "b"
    assert str(finding) == (
        "worker b has made no progress for 9.0 s while others wait: user code (step 7, slot 0), "
        "/home/me/train.py:57 in load: lock.acquire()"
    )
    assert [each.workers for each in found.groups] == [("a", "c"), ("b",)]


def test_the_stopped_and_the_silent_come_first() -> None:
    busy = seen("b", LOCK, MAIN, operation="user code", waits=False)
    found = examine([waiting("a"), busy, seen("c", REDUCE, MAIN, state="T")], silent=("d",))
    assert [(each.worker, each.why.split()[0]) for each in found.findings] == [("d", "could"), ("c", "is"), ("b", "has")]


def test_where_all_wait_the_minority_is_named() -> None:
    alone = seen("b", REDUCE, STEP, LOCK, operation="an evaluation")
    (finding,) = examine([waiting("a"), alone, waiting("c")]).findings
    assert (finding.worker, finding.why) == ("b", "is elsewhere than the others") and "an evaluation" in finding.place
    assert {each.worker for each in examine([waiting("a"), alone]).findings} == {"a", "b"}, "nobody is in the majority"
    assert examine([waiting("a"), waiting("b")]).findings == ()
    assert examine([]).groups == ()


def test_a_step_behind_is_another_place() -> None:
    (finding,) = examine([waiting("a"), waiting("b"), seen("c", REDUCE, STEP, MAIN, step=6)]).findings
    assert finding.worker == "c" and "step 6" in finding.place


def test_a_worker_of_the_loader_is_named_with_its_line() -> None:
    reader = ThreadStack(2, "", False, (StackFrame("read", "/lib/os.py", 1), LOCK))
    (finding,) = examine([waiting("a"), seen("b", MAIN, operation="reading data", waits=False, more=(reader,))]).findings
    assert "its process 2 is at /home/me/train.py:57 in load: lock.acquire()" in finding.place


def test_stacks_are_alike_that_part_only_near_the_end_and_not_in_the_users_code() -> None:
    assert len(group([waiting("a", 30), waiting("b", 31)])) == 1
    outer = [STEP] * 9
    assert similarity([REDUCE, *outer, MAIN], [StackFrame("poll", "/lib/x.py", 1), *outer, MAIN]) == 10 / 11
    assert similarity([LOCK, *outer, MAIN], [*outer, MAIN]) == 0.0
    assert similarity([], []) == 1.0 and similarity([], [REDUCE]) == 0.0


def test_where_nothing_is_known_of_the_code_that_is_said() -> None:
    (finding,) = examine([waiting("a"), seen("b", waits=False)]).findings
    assert finding.place == "the reduction (step 7, slot 0), where in the code is not known"


def test_what_is_said_of_many_workers_is_bounded() -> None:
    many = [seen(f"w{n}", LOCK, MAIN, operation="user code", step=n, waits=False) for n in range(500)]
    found = examine([*many, waiting("a")], silent=[f"s{n}" for n in range(100)])
    assert len(found.findings) == FINDINGS_MAX and len(found.groups) == GROUPS_MAX
    assert found.findings[0].worker == "s0"
