"""Pipelines whose stages are not as fast as planned: their layers, or only their slots, go elsewhere, if that pays.

    what each worker computes in a step (its heartbeats) -> speeds -> the best layout for these -> the loss since then has
    reached the cost of the move -> SWITCH with the same members (`switching.py`)

Speeds are kept for every later layout until they are measured anew. The measure of a speed, and of when a move pays, is
`monitoring/stragglers.py`'s; how a pipeline is cut is `recovery/pipelines.py`'s.
"""

from __future__ import annotations

from controller.events import Persist
from controller.job import Job
from controller.layouts import model_of, speeds_by_rank
from controller.state import Worker
from elastic.domain import Plan, WorkerStatus
from monitoring.stragglers import SEEN_STEPS, ComputeClock, speeds
from recovery.pipelines import Layout, as_it_is, held_in, lay_out

GAIN_MIN = 0.10
"""Of a step's time; less is within what a machine does by itself."""
BYTES_PER_S = 5e8
"""At which layers are expected to move between workers: a quarter of what gloo alone does on one machine."""


def note_compute(job: Job, worker: Worker, status: WorkerStatus) -> None:
    """Take down what a worker's newest step took it."""
    if job.spec is not None and job.spec.is_pipeline and status.compute_s > 0:
        clock = job.computing.setdefault(worker.id, ComputeClock())
        clock.note(status.generation, status.committed, status.compute_s)


def worth_moving(job: Job) -> str:
    """Return why layers or slots should move between the members of the present world, or ""."""
    plan, spec = job.plan, job.spec
    if plan is None or spec is None or not spec.is_pipeline or job.unsettled or len(plan.stages) < 2:
        return ""
    if not job.rental.measures(job.step_committed):
        return ""
    is_news = _measure(job, plan)
    if is_news is None or not job.rental.looks(job.step_committed, is_news=is_news):
        return ""
    names = [member.worker for member in plan.members]
    model, found = model_of(spec), speeds_by_rank(job, names)
    present_s = as_it_is(model, plan.stages, plan.all_routes(), found).step_s
    other = lay_out(model, len(names), held_in(plan, names), found)
    gain_s = present_s - other.prediction.step_s if isinstance(other, Layout) else 0.0
    if not isinstance(other, Layout) or gain_s < GAIN_MIN * present_s:
        job.rental.end()
        return ""
    cost_s = other.moved_bytes / BYTES_PER_S + other.prediction.step_s
    if not job.rental.is_due(job.step_committed, gain_s, cost_s, SEEN_STEPS):
        return ""
    job.rental.buy(job.step_committed)
    slow = ", ".join(f"{names[rank]} at {100 * speed:.0f} %" for rank, speed in sorted(found.items()))
    share = 100 * gain_s / present_s
    what = "slots are re-dealt" if other.stages == plan.stages else "layers move"
    return f"{what} ({slow or 'all alike'}): steps are {share:.0f} % longer than they need be"


def _measure(job: Job, plan: Plan) -> bool | None:
    """Measure the members' speeds; returns whether others are slow than before, None where some have not computed long enough."""
    assert job.spec is not None
    layers = job.spec.layers
    measured, newest, expected = {}, {}, {}
    for stage in plan.stages:
        each = sum(layer.forward_s + layer.backward_s for layer in layers[stage.first : stage.last])
        for rank in stage.ranks:
            expected_s = each * sum(rank in plan.route(slot) for slot in range(plan.slots))
            if not expected_s:
                continue  # it has no slot, or next to nothing to compute
            clock = job.computing.get(plan.members[rank].worker)
            seconds = clock.median_s(plan.generation) if clock is not None else None
            if clock is None or seconds is None:
                return None
            measured[rank], newest[rank], expected[rank] = seconds, clock.newest_s(), expected_s
    found = speeds(measured, expected)
    of_late = speeds(newest, expected)
    before = dict(job.speeds)
    for member in plan.members:
        if member.rank in found:
            job.speeds[member.worker] = round(of_late.get(member.rank, found[member.rank]), 2)
        else:
            job.speeds.pop(member.worker, None)
    is_news = job.speeds.keys() != before.keys()
    if is_news:
        slow = ", ".join(f"{name} {100 * speed:.0f} %" for name, speed in sorted(job.speeds.items()))
        job.emit(Persist("speeds-changed", f"speeds beside the usual one: {slow or 'all alike'}", {"speeds": dict(job.speeds)}))
    return is_news
