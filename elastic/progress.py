"""The progress page: one page of shared memory through which a worker shows its agent that it lives.

A heartbeat thread keeps beating while the main thread hangs, and a thread that holds the GIL stops it while all is
well; a counter in shared memory has neither fault, and reading it costs the worker nothing. Every field is eight bytes
and aligned, so a reader sees old or new, never a mixture. The page carries numbers for people and for the detection of
hangs; no decision about committed state is ever taken from it.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from elastic.timers import Phase

PAGE_SIZE_BYTES = 4096
_FIELDS = ("progress", "generation", "committed", "samples")
_OFFSET = {name: 8 * index for index, name in enumerate(_FIELDS)}
_LOSS_OFFSET = 8 * len(_FIELDS)
_BUSY_OFFSET = _LOSS_OFFSET + 8
_WAITS_OFFSET = _BUSY_OFFSET + 8
_COMPUTE_OFFSET = _WAITS_OFFSET + 8
_NORM_OFFSET = _COMPUTE_OFFSET + 8
_OPERATION_OFFSET = _NORM_OFFSET + 8
_STEP_OFFSET = _OPERATION_OFFSET + 8
_SLOT_OFFSET = _STEP_OFFSET + 8
_SKIPPED_OFFSET = _SLOT_OFFSET + 8
_SPREAD_OFFSET = _SKIPPED_OFFSET + 8
_EVALUATED_OFFSET = _SPREAD_OFFSET + 8
_BUSY_SECONDS_OFFSET = _EVALUATED_OFFSET + 8
_STEPS_OFFSET = 512  # so many steps were timed, and then a ring of the newest ones
_RING_OFFSET = _STEPS_OFFSET + 8
_STEP = struct.Struct(f"{1 + len(Phase)}d")  # number, seconds by phase
RING_STEPS = 48
# Fields are written as items of a view, eight bytes at once: `pack_into` clears what it writes first, and a reader may see that.
_UNSIGNED = struct.Struct("Q")
_DOUBLE = struct.Struct("d")


class Operation(enum.IntEnum):
    """What a worker's main thread began last."""

    STARTING = 0
    DATA = 1
    SLOT = 2
    FORWARD = 3
    BACKWARD = 4
    REDUCTION = 5
    VERDICT = 6
    REGROUPING = 7
    STATE = 8
    CALLBACK = 9
    END = 10
    EVALUATION = 11

    @property
    def words(self) -> str:
        """For people."""
        return _WORDS[self]


_WORDS = {
    Operation.STARTING: "starting",
    Operation.DATA: "reading data",
    Operation.SLOT: "user code",
    Operation.FORWARD: "user code after a forward",
    Operation.BACKWARD: "backward",
    Operation.REDUCTION: "the reduction",
    Operation.VERDICT: "the verdict",
    Operation.REGROUPING: "waiting for other workers",
    Operation.STATE: "passing the state on",
    Operation.CALLBACK: "a callback of on_commit",
    Operation.END: "after the loop",
    Operation.EVALUATION: "an evaluation",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress page showed at one moment.

    Attributes:
        progress: Forwards, backwards, fetches and heartbeats so far.
        busy_until_s: CLOCK_MONOTONIC until which the user has announced to make no progress.
        waits: Whether the main thread waits for others (in a reduction, a verdict, a regroup), so that it is not to
            blame for making no progress.
        compute_s: What the newest step took in forwards and backwards; 0 where that is not measured.
        gradient_norm: Of the newest step's gradient of the stage; 0 where that is not measured.
        operation: What was begun last ...
        step, slot: ... and where; slot -1 for none.
        skipped: Steps so far that went by without an update, since something in them was not finite.
        spread: How far apart replicas are that never agree in full (`session.spread`); NaN where they do.
        evaluated_s: Seconds so far between steps in which a prepared model ran forward.
        busy_s: Those between steps in other sections that `session.busy()` announced.
    """

    progress: int
    generation: int
    committed: int
    samples: int
    loss: float
    busy_until_s: float
    waits: bool
    compute_s: float = 0.0
    gradient_norm: float = 0.0
    operation: Operation = Operation.STARTING
    step: int = 0
    slot: int = -1
    skipped: int = 0
    spread: float = float("nan")
    evaluated_s: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the time of one step went in one worker: seconds by phase."""

    step: int
    seconds: tuple[float, ...]


class ProgressPage:
    """One worker's page; the worker writes, the agent reads.

    Raises:
        OSError: the file descriptor is no memory file of a page.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_SIZE_BYTES)
        self._words, self._doubles = memoryview(self._map).cast("Q"), memoryview(self._map).cast("d")
        self._count = 0
        self._skipped = 0
        self._steps = 0

    @staticmethod
    def create(name: str) -> int:
        """Return the descriptor of a new page (a memfd: it vanishes with its last user)."""
        fd = os.memfd_create(f"elastic-progress-{name}")
        os.ftruncate(fd, PAGE_SIZE_BYTES)
        page = mmap.mmap(fd, PAGE_SIZE_BYTES)
        _DOUBLE.pack_into(page, _LOSS_OFFSET, float("nan"))
        _DOUBLE.pack_into(page, _SPREAD_OFFSET, float("nan"))
        page.close()
        return fd

    def beat(self) -> None:
        """Count one forward, backward or fetch."""
        self._count += 1
        self._words[_OFFSET["progress"] // 8] = self._count

    def busy_until(self, clock_s: float) -> None:
        """Announce that there will be no progress until then (CLOCK_MONOTONIC)."""
        self._doubles[_BUSY_OFFSET // 8] = clock_s

    def waits(self, waits: bool) -> None:
        """Say whether the main thread waits for others from now on."""
        self._words[_WAITS_OFFSET // 8] = int(waits)

    def doing(self, operation: Operation) -> Operation:
        """Say what is begun now; returns what was before."""
        before: int = _UNSIGNED.unpack_from(self._map, _OPERATION_OFFSET)[0]
        self._words[_OPERATION_OFFSET // 8] = operation
        return Operation(before)

    def place(self, step: int, slot: int) -> None:
        """Say which step and slot are computed from now on; slot -1 for none."""
        self._words[_STEP_OFFSET // 8] = step
        self._words[_SLOT_OFFSET // 8] = slot + 1

    def show(self, *, generation: int, committed: int, samples: int, loss: float) -> None:
        """Write what people see."""
        self._words[_OFFSET["generation"] // 8] = generation
        self._words[_OFFSET["committed"] // 8] = committed
        self._words[_OFFSET["samples"] // 8] = samples
        self._doubles[_LOSS_OFFSET // 8] = loss

    def computed(self, seconds: float) -> None:
        """Show what the newest step took in forwards and backwards."""
        self._doubles[_COMPUTE_OFFSET // 8] = seconds

    def reduced(self, gradient_norm: float) -> None:
        """Show the norm of the newest step's gradient."""
        self._doubles[_NORM_OFFSET // 8] = gradient_norm

    def skip(self) -> None:
        """Count a step without an update."""
        self._skipped += 1
        self._words[_SKIPPED_OFFSET // 8] = self._skipped

    def spreads(self, spread: float) -> None:
        """Show how far apart replicas are."""
        self._doubles[_SPREAD_OFFSET // 8] = spread

    def went_aside(self, evaluated_s: float, busy_s: float) -> None:
        """Show for how long, so far, something else was done between steps."""
        self._doubles[_EVALUATED_OFFSET // 8] = evaluated_s
        self._doubles[_BUSY_SECONDS_OFFSET // 8] = busy_s

    def timed(self, step: int, seconds: Sequence[float]) -> None:
        """Add a step to the ring: first what it took, then that it is there."""
        _STEP.pack_into(self._map, _RING_OFFSET + self._steps % RING_STEPS * _STEP.size, step, *seconds)
        self._steps += 1
        self._words[_STEPS_OFFSET // 8] = self._steps

    def steps(self, after: int) -> tuple[int, list[StepTimes]]:
        """Return how many steps were timed so far, and those behind the first `after` of them that the ring still has."""
        count: int = _UNSIGNED.unpack_from(self._map, _STEPS_OFFSET)[0]
        numbers = range(max(after, count - RING_STEPS), count)
        found = [_STEP.unpack_from(self._map, _RING_OFFSET + number % RING_STEPS * _STEP.size) for number in numbers]
        # One place may be written just now, and so many more were while this was read.
        whole_from: int = _UNSIGNED.unpack_from(self._map, _STEPS_OFFSET)[0] + 1 - RING_STEPS
        whole = [one for number, one in zip(numbers, found, strict=True) if number >= whole_from]
        return count, [StepTimes(int(one[0]), one[1:]) for one in whole]

    def read(self) -> Progress:
        """Return what the page shows now."""
        values = {name: _UNSIGNED.unpack_from(self._map, offset)[0] for name, offset in _OFFSET.items()}
        return Progress(
            progress=values["progress"],
            generation=values["generation"],
            committed=values["committed"],
            samples=values["samples"],
            loss=_DOUBLE.unpack_from(self._map, _LOSS_OFFSET)[0],
            busy_until_s=_DOUBLE.unpack_from(self._map, _BUSY_OFFSET)[0],
            waits=bool(_UNSIGNED.unpack_from(self._map, _WAITS_OFFSET)[0]),
            compute_s=_DOUBLE.unpack_from(self._map, _COMPUTE_OFFSET)[0],
            gradient_norm=_DOUBLE.unpack_from(self._map, _NORM_OFFSET)[0],
            operation=Operation(_UNSIGNED.unpack_from(self._map, _OPERATION_OFFSET)[0]),
            step=_UNSIGNED.unpack_from(self._map, _STEP_OFFSET)[0],
            slot=_UNSIGNED.unpack_from(self._map, _SLOT_OFFSET)[0] - 1,
            skipped=_UNSIGNED.unpack_from(self._map, _SKIPPED_OFFSET)[0],
            spread=_DOUBLE.unpack_from(self._map, _SPREAD_OFFSET)[0],
            evaluated_s=_DOUBLE.unpack_from(self._map, _EVALUATED_OFFSET)[0],
            busy_s=_DOUBLE.unpack_from(self._map, _BUSY_SECONDS_OFFSET)[0],
        )

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self._doubles.release()
        self._map.close()
