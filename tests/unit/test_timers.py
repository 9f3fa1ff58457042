"""Step timers: every moment in one phase, a ring that loses nothing but what is old, and next to no cost."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from elastic.progress import RING_STEPS, ProgressPage, StepTimes
from elastic.timers import Aside, Phase, StepTimer

SECONDS = [0.0] * len(Phase)


class Sink:
    def __init__(self) -> None:
        self.steps: list[tuple[int, list[float]]] = []
        self.aside_s = (0.0, 0.0)

    def timed(self, step: int, seconds: Sequence[float]) -> None:
        self.steps.append((step, list(seconds)))

    def went_aside(self, evaluated_s: float, busy_s: float) -> None:
        self.aside_s = (evaluated_s, busy_s)


def page() -> ProgressPage:
    fd = ProgressPage.create("test")
    try:
        return ProgressPage(fd)
    finally:
        os.close(fd)


def test_every_moment_of_a_step_is_in_one_phase() -> None:
    now = 0.0
    sink = Sink()
    published = sink.steps
    timer = StepTimer(sink, lambda: now)
    for number, phase in enumerate((Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.REDUCE, Phase.VOTE, Phase.OPTIMIZER)):
        now += number + 1
        timer.enter(phase)
    now += 0.5
    timer.committed(3)
    now += 2.0
    timer.enter(Phase.DATA)
    timer.committed(4)
    assert published[0] == (3, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.5])
    assert published[1][1][Phase.OUTSIDE] == 2.0


def test_the_ring_gives_each_step_once_and_forgets_the_oldest() -> None:
    shown = page()
    assert shown.steps(0) == (0, [])
    shown.timed(1, [0.5, *SECONDS[1:]])
    count, steps = shown.steps(0)
    assert count == 1 and steps == [StepTimes(1, (0.5, *SECONDS[1:]))]
    assert shown.steps(count) == (1, [])
    for step in range(2, 2 * RING_STEPS):
        shown.timed(step, SECONDS)
    count, steps = shown.steps(1)
    assert count == 2 * RING_STEPS - 1
    # The place that would be written next is not trusted.
    assert [step.step for step in steps] == list(range(RING_STEPS + 1, 2 * RING_STEPS))
    before = shown.read()
    shown.skip()
    shown.spreads(0.25)
    after = shown.read()
    assert (before.skipped, after.skipped, after.spread) == (0, 1, 0.25)


def test_timing_a_step_costs_less_than_a_tenth_of_a_millisecond() -> None:
    """Under 1 % of a step of 10 ms, with four slots of five changes each."""
    shown = page()
    timer = StepTimer(shown)
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for step in range(20):
            for _ in range(4):
                for phase in (Phase.VOTE, Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.REDUCE):
                    timer.enter(phase)
            timer.committed(step)
        best = min(best, (time.perf_counter() - began) / 20)
    print(f"{best * 1e6:.1f} us per step")
    assert best < 1e-4


def test_evaluations_and_announced_sections_between_steps_are_told_apart() -> None:
    now = 0.0
    sink = Sink()
    timer = StepTimer(sink, lambda: now)
    timer.committed(1)
    now += 1.0
    timer.enter(Phase.FORWARD)  # a scheduler, some logging: part of training
    timer.ran_forward()
    assert timer.phase is Phase.BACKWARD and sink.aside_s == (0.0, 0.0)
    timer.committed(2)
    timer.ran_forward()
    timer.goes_aside(Aside.BUSY)
    now += 5.0
    timer.enter(Phase.DATA)
    assert sink.aside_s == (5.0, 0.0)
    timer.goes_aside(Aside.BUSY)  # within a step it says nothing of what is aside
    timer.committed(3)
    timer.goes_aside(Aside.BUSY)
    now += 3.0
    timer.enter(Phase.DATA)
    assert sink.aside_s == (5.0, 3.0)


def test_a_reader_never_sees_half_of_a_step_while_a_worker_writes() -> None:
    fd = ProgressPage.create("test")
    shown = ProgressPage(fd)
    writer = os.fork()
    if not writer:
        mine = ProgressPage(fd)
        for step in range(1, 100_001):
            mine.timed(step, [float(step)] * len(Phase))
        os._exit(0)
    os.close(fd)
    seen, read, deadline = 0, 0, time.monotonic() + 60.0
    while seen < 100_000 and time.monotonic() < deadline:
        seen, steps = shown.steps(seen)
        read += len(steps)
        assert all(step.seconds == (float(step.step),) * len(Phase) for step in steps)
    assert os.waitpid(writer, 0)[1] == 0 and seen == 100_000 and read > 0
