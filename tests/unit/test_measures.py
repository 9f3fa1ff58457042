"""Step times, the progress page and the record of samples."""

from __future__ import annotations

import math
import os
from pathlib import Path

from elastic.progress import ProgressPage
from elastic.records import SampleRecord, read_record
from monitoring.steps import StepClock, incident_cost_s


def test_a_step_clock_takes_the_median_and_ignores_what_is_no_news() -> None:
    clock = StepClock()
    assert clock.median_s() == 0.0
    for at, committed in ((0.0, 1), (1.0, 2), (1.5, 2), (3.0, 4), (13.0, 5), (14.0, 6)):
        clock.note(at, committed)
    assert clock.median_s() == 1.0


def test_an_incident_costs_what_exceeds_the_step_that_was_due_anyway() -> None:
    assert incident_cost_s(10.0, 10.5, 0.25) == 0.25
    assert incident_cost_s(10.0, 10.1, 0.25) == 0.0


def test_a_progress_page_is_read_by_another_mapping() -> None:
    fd = ProgressPage.create("test")
    writer, reader = ProgressPage(fd), ProgressPage(fd)
    os.close(fd)
    assert math.isnan(reader.read().loss)
    writer.beat()
    writer.beat()
    writer.show(generation=3, committed=17, samples=340, loss=0.5)
    seen = reader.read()
    assert (seen.progress, seen.generation, seen.committed, seen.samples, seen.loss) == (2, 3, 17, 340, 0.5)
    writer.close()
    reader.close()


def test_of_a_redone_step_the_newest_generation_is_the_truth(tmp_path: Path) -> None:
    SampleRecord(tmp_path, "a/0.1").write(1, 1, {0: (1, 2), 1: (3, 4)})
    SampleRecord(tmp_path, "b/0.1").write(2, 1, {1: (7, 8)})
    SampleRecord(tmp_path, "a/0.1").write(2, 2, {0: (5, 6), 1: (7, 8)})
    assert read_record(tmp_path) == {(1, 0): (1, 2), (1, 1): (3, 4), (2, 0): (5, 6), (2, 1): (7, 8)}
