"""Whom a world waits for: workers are grouped by where they are, and the silent and the odd ones are named (pure).

After MegaScale (those that wait say so; whoever is at fault says nothing) and ByteRobust (dominant groups of stacks are healthy,
the outliers are not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.domain import StackFrame, ThreadStack, WorkerEvidence

SIMILARITY_MIN = 0.8
"""Share of the longer of two stacks that both begin with, from the outermost call on, if they count as alike."""


GROUPS_MAX = 32
FINDINGS_MAX = 32


@dataclass(frozen=True, slots=True)
class Group:
    """Workers that are in the same place.

    Attributes:
        workers: in the order in which they were given.
        place: where, in words.
        frames: the main thread of the first one, innermost frame first.
    """

    workers: tuple[str, ...]
    place: str
    frames: tuple[StackFrame, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """A worker that does not do what the others do.

    Attributes:
        worker: its id.
        why: what sets it apart.
        place: operation, step, slot and line of code, in words.
    """

    worker: str
    why: str
    place: str

    def __str__(self) -> str:
        return f"worker {self.worker} {self.why}: {self.place}"


@dataclass(frozen=True, slots=True)
class Examination:
    """What the evidence of all workers says together.

    Attributes:
        groups: the largest first, GROUPS_MAX of them.
        findings: who is at fault, the surest first, FINDINGS_MAX of them.
    """

    groups: tuple[Group, ...]
    findings: tuple[Finding, ...]


def examine(evidence: Sequence[WorkerEvidence], silent: Sequence[str] = ()) -> Examination:
    """Group workers and name those that the others wait for.

    Args:
        evidence: of every worker that was looked at.
        silent: workers of whom nothing was heard.
    """
    groups = group(evidence)
    stopped = [each for each in evidence if each.process_state in ("T", "t")]
    busy = [each for each in evidence if not each.waits and each not in stopped]
    findings = [Finding(name, "could not be looked at", "its node did not answer") for name in silent]
    findings += [Finding(each.worker, "is stopped by a signal", place_of(each)) for each in stopped]
    if len(busy) < len(evidence):  # where nobody waits, all are busy, and none of them is odd for that
        findings += [
            Finding(each.worker, f"has made no progress for {each.since_s:.1f} s while others wait", place_of(each))
            for each in sorted(busy, key=lambda each: -each.since_s)
        ]
    if not findings:
        findings = _odd(evidence, groups)
    return Examination(groups, tuple(findings[:FINDINGS_MAX]))


def _odd(evidence: Sequence[WorkerEvidence], groups: Sequence[Group]) -> list[Finding]:
    """Those that are not where most are; where no place is most workers', all of them."""
    if len(groups) < 2:
        return []
    has_majority = len(groups[0].workers) > len(groups[1].workers)
    usual = groups[0].workers if has_majority else ()
    why = "is elsewhere than the others" if has_majority else "is in one of several places"
    return [Finding(each.worker, why, place_of(each)) for each in evidence if each.worker not in usual]


def group(evidence: Sequence[WorkerEvidence]) -> tuple[Group, ...]:
    """Put workers together whose operation is the same and whose main threads' stacks are alike; the largest first.

    Steps count too, since a worker that is a step behind is not where the others are; slots do not. Whoever is like none of the
    first GROUPS_MAX groups is in none.
    """
    members: list[list[WorkerEvidence]] = []
    for each in evidence:
        like = next((found for found in members if _is_alike(found[0], each)), None)
        if like is not None:
            like.append(each)
        elif len(members) < GROUPS_MAX:
            members.append([each])
    members.sort(key=len, reverse=True)
    return tuple(Group(tuple(e.worker for e in found), place_of(found[0]), main_frames(found[0])) for found in members)


def _is_alike(one: WorkerEvidence, other: WorkerEvidence) -> bool:
    def state(each: WorkerEvidence) -> tuple[str, int, bool, bool]:
        return each.operation, each.step, each.waits, each.process_state in ("T", "t")

    return state(one) == state(other) and similarity(main_frames(one), main_frames(other)) >= SIMILARITY_MIN


def similarity(one: Sequence[StackFrame], other: Sequence[StackFrame]) -> float:
    """Share of the longer stack's calls that both begin with; the user's calls must be in the same lines, too."""
    if not one and not other:
        return 1.0
    common = 0
    for mine, theirs in zip(reversed(one), reversed(other), strict=False):
        if (mine.function, mine.file) != (theirs.function, theirs.file) or (mine.of_user and mine.line != theirs.line):
            break
        common += 1
    rest = (*one[: len(one) - common], *other[: len(other) - common])
    if any(frame.of_user for frame in rest):
        return 0.0  # they have parted in the user's code
    return common / max(len(one), len(other))


def main_frames(evidence: WorkerEvidence) -> tuple[StackFrame, ...]:
    """The main thread's stack, innermost frame first; none where it is not known."""
    return next((stack.frames for stack in evidence.stacks if stack.is_main), ())


def line_of(frames: Sequence[StackFrame]) -> str:
    """The innermost line of the user's code, or else the innermost line, in words; "" without any."""
    frame = next((each for each in frames if each.of_user), frames[0] if frames else None)
    if frame is None:
        return ""
    code = f": {frame.code}" if frame.code else ""
    return f"{frame.file}:{frame.line} in {frame.function}{code}"


def place_of(evidence: WorkerEvidence) -> str:
    """Operation, step, slot and line of a worker, in words."""
    slot = f", slot {evidence.slot}" if evidence.slot >= 0 else ""
    line = line_of(main_frames(evidence)) or "where in the code is not known"
    reader = next((s for s in evidence.stacks if _is_reader(s, evidence)), None)
    child = f"; its process {reader.pid} is at {line_of(reader.frames)}" if reader is not None else ""
    return f"{evidence.operation} (step {evidence.step}{slot}), {line}{child}"


def _is_reader(stack: ThreadStack, evidence: WorkerEvidence) -> bool:
    """Whether this is a thread of a child process that is in the user's code: a data-loader worker, for example."""
    return stack.pid != evidence.pid and any(frame.of_user for frame in _innermost(stack.frames))


def _innermost(frames: Sequence[StackFrame], count: int = 4) -> Sequence[StackFrame]:
    return frames[:count]
