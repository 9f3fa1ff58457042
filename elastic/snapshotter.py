"""When a worker captures its slice of the state, and which of its snapshots must stay.

All workers capture the same steps: each says in its vote whether it can and wants to, and the verdict says whether all do.
Who could not after all says so in its next vote, and all let go of that step: everybody holds the same ones.
The verdict carries the newest step that is safe as far as each worker goes, too; the least of these is the *stable* step,
and nothing of it is overwritten before a newer one is stable. The copying is `capture.py`'s. Nothing here ever waits: where
there is no room yet, the step is not captured, and that is counted.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Protocol

from elastic.cadence import AUTO, snapshot_interval_s
from elastic.domain import NO_STEP, Plan
from elastic.errors import ConfigError, Unreachable
from elastic.snapshots import NO_OPINION, Ballot, SnapshotId

STEP_S_MIN = 1e-6


class Capturer(Protocol):
    """Who copies; see `elastic.capture.Capturer`."""

    @property
    def protected(self) -> SnapshotId | None: ...

    @property
    def cost_s(self) -> float: ...

    def has_room(self, generation: int, stable: int) -> bool: ...

    def show_stable(self, step: int) -> None: ...

    def capture(self, step: int, generation: int, index: int, count: int) -> bool: ...

    def discard(self, snapshot: SnapshotId) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Due:
    """What is captured once the step has ended."""

    step: int
    generation: int
    rank: int
    world_size: int


class Snapshotter:
    """One worker's part in the snapshots of its job.

    Args:
        capturer: Copies the state; None where no snapshots are taken.
        every: Steps from one snapshot to the next; AUTO: as often as is cheap.
        period: Steps from one whose state can be captured to the next; others are never captured.

    Attributes:
        stable: Newest step whose snapshot the whole world holds; NO_STEP for none.
        skipped: Snapshots that were due and for which there was no room.
    """

    def __init__(self, capturer: Capturer | None = None, every: int = 0, period: int = 1) -> None:
        self._capturer = capturer if every else None
        self._every = every if every == AUTO else -(-every // period) * period
        self._period = period
        self._refused = False
        self._due: _Due | None = None
        self._captured: SnapshotId | None = None
        self._previous: SnapshotId | None = None  # captured before that
        self._agreed: SnapshotId | None = None  # the last that all agreed to capture
        self._void: SnapshotId | None = None  # the last of which somebody has no slice
        self._missed = False
        self._captured_at_s = self._voted_at_s = -math.inf
        self._restores_per_s = 0.0
        self._step_s = STEP_S_MIN
        self.stable = NO_STEP
        self.skipped = 0

    def expect(self, restores_per_s: float) -> None:
        """How often the job has to go back to a snapshot, as far as that can be told, from now on."""
        self._restores_per_s = restores_per_s

    def vote(self, step: int, plan: Plan, now_s: float) -> Ballot:
        """Return what this worker says of snapshots in its vote on a step."""
        if self._capturer is None:
            return Ballot()
        missed = self._missed and self._agreed is not None and self._agreed.generation == plan.generation
        if self._refused:
            return Ballot(self.stable, False, missed, self.stable)
        if math.isfinite(self._voted_at_s):
            self._step_s = max(STEP_S_MIN, now_s - self._voted_at_s)
        self._voted_at_s = now_s
        wants = self._is_due(step, plan, now_s)
        room = self._capturer.has_room(plan.generation, self.stable) and wants
        self.skipped += wants and not room
        return Ballot(self._protected(plan), room, missed, self.stable)

    def _is_due(self, step: int, plan: Plan, now_s: float) -> bool:
        assert self._capturer is not None
        if step % self._period:
            return False
        if self._captured is None or self._captured.generation != plan.generation:
            return True  # what an older world left is protected by others than those who are here
        if self._every != AUTO:
            return step % self._every == 0
        if self._restores_per_s <= 0:
            return False
        interval_s = snapshot_interval_s(self._capturer.cost_s, self._restores_per_s, step_s=self._step_s)
        return now_s - self._captured_at_s >= interval_s

    def _protected(self, plan: Plan) -> int:
        captured = self._captured
        if captured is not None and captured.generation == plan.generation:
            # All members of this world have captured what this one has, or say now that they missed it: they vote on the
            # step after it. Of an older world somebody may have been lost before it had.
            assert self._capturer is not None
            safe = self._capturer.protected if plan.parity_shards else captured
            if safe is not None and safe.generation == plan.generation and safe != self._void:
                return safe.step
        has_none = captured is None and self.stable == NO_STEP and not self._missed
        return NO_OPINION if has_none else self.stable

    def decided(self, step: int, plan: Plan, rank: int, verdict: Ballot) -> None:
        """Take up what the verdict on a step says; the step is committed here."""
        if self._capturer is None:
            return
        if verdict.missed:
            self._drop_agreed()
        safe = verdict.protected if verdict.protected != NO_OPINION else NO_STEP
        self.stable = max(self.stable, verdict.stable, safe)
        # At once: the next snapshot's parity may have to wait until that of an older one is let go of.
        self._capturer.show_stable(self.stable)
        self._due = _Due(step, plan.generation, rank, plan.world_size) if verdict.captures else None

    def _drop_agreed(self) -> None:
        """Somebody has no slice of the last snapshot, so that it will never be whole: all hold the same ones again."""
        assert self._capturer is not None
        agreed, self._agreed = self._agreed, None
        if agreed is not None and self._captured == agreed:
            self._capturer.discard(agreed)
            self._captured = self._previous
        self._void = agreed

    def step_ended(self, step: int, generation: int, now_s: float) -> None:
        """Capture the step if that was decided: what user code does after optimizer.step() has been done.

        Not if the world has changed since, since whoever left it has nothing to capture any more.
        """
        due, self._due = self._due, None
        if due is None or self._capturer is None or (due.step, due.generation) != (step, generation):
            return
        self._agreed, self._missed = SnapshotId(step, generation), True
        try:
            captured = self._capturer.capture(step, generation, due.rank, due.world_size)
        except (ConfigError, Unreachable) as error:
            print(f"elastic: no snapshots are taken any more: {error}", file=sys.stderr, flush=True)
            self._refused = True
            return
        if captured:
            self._previous, self._captured, self._captured_at_s = self._captured, self._agreed, now_s
            self._missed = False
        else:
            self.skipped += 1

    def restored(self, step: int) -> None:
        """The whole world has gone back to the snapshot of this step."""
        self._due = self._captured = self._previous = self._agreed = None
        self._missed = False
        self.stable = step
        if self._capturer is not None:
            self._capturer.show_stable(step)

    def finish(self) -> None:
        """Wait until nothing is read any more that a commit is about to write."""
        if self._capturer is not None:
            self._capturer.finish()
