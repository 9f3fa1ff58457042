"""Pipelines as the controller sees them: how the next world's is cut, and what is left of one after a loss.

A world that continues a step keeps its stages, so that nothing has to move while all stand still. Every other one is cut
anew by `recovery/pipelines.py`. Jobs whose workers each hold the whole model have no layout, and nothing here concerns them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from controller.job import Job
from elastic.digests import digest_of_parts
from elastic.domain import Leaving, Plan, PlanKind, Stage, TrainingSpec
from elastic.pipeline.actions import Schedule
from elastic.pipeline.moves import handovers
from recovery.pipelines import Layout, Model, NoLayout, Ways, held_in, lay_out, rerouted
from recovery.ways import skipping_ways, swapped_ways

LAYOUTS_KEPT = 64


def model_of(spec: TrainingSpec, ways: Ways | None = None) -> Model:
    """Return what is to be cut, with the ways of the slots if not all go straight."""
    return Model(
        ways=ways or Ways(),
        layers=spec.layers,
        slots=spec.slots,
        virtual_replicas=spec.virtual_replicas,
        stages=spec.stages,
        memory_bytes=spec.memory_bytes,
        schedule=Schedule(spec.schedule),
    )


def layout_for(
    job: Job, kind: PlanKind, names: Sequence[str], before: Plan | None, *, is_cut_anew: bool = False
) -> Layout | NoLayout | None:
    """Return how a pipeline is cut among the members of the next world, in order of rank; None where there is no pipeline.

    `before` is the world whose interrupted step a FENCE continues, and from which a SWITCH moves layers, or a FENCE that has
    lost some and is cut anew.
    """
    assert job.spec is not None
    if not job.spec.is_pipeline:
        return None
    ways = ways_of(job, len(names))
    if isinstance(ways, NoLayout):
        return ways
    model, speeds = model_of(job.spec, ways), speeds_by_rank(job, names)
    if kind is PlanKind.FENCE and before is not None and not is_cut_anew:
        return rerouted(model, _kept_stages(before, names), "stages stay as they are", speeds)
    if before is not None and (kind is PlanKind.SWITCH or is_cut_anew):
        return lay_out(model, len(names), held_in(before, names), speeds)
    return _anew(job, names)


def ways_of(job: Job, workers: int) -> Ways | NoLayout:
    """Return the ways of the slots, for the job's whole life: those of the newest world, or chosen for a first one of so many
    workers.
    """
    assert job.spec is not None
    settings, plan = job.settings, job.plan
    if plan is not None:
        return Ways(tuple(path.layers for path in plan.paths), plan.path_of, settings.swap_ends)
    if not settings.swap_ends and not settings.skip_ratio:
        return Ways()
    if job.ways[0] != workers:
        model = model_of(job.spec)
        if settings.swap_ends:
            option, found = "--swap-ends", swapped_ways(model, workers)
        else:
            option = f"--skip-ratio {settings.skip_ratio:g}"
            found = skipping_ways(model, workers, settings.skip_ratio)
        if isinstance(found, NoLayout):
            return NoLayout(f"{option}: {found.reason}", is_final=True)
        job.ways = workers, found
        job.layouts.clear()
    return job.ways[1]


def _anew(job: Job, names: Sequence[str]) -> Layout | NoLayout:
    """The layout of a world whose members hold nothing yet, or read it all; computed once."""
    assert job.spec is not None
    speeds = speeds_by_rank(job, names)
    key = len(names), tuple(sorted(speeds.items()))
    ways = ways_of(job, len(names))
    if isinstance(ways, NoLayout):
        return ways
    if key not in job.layouts:
        if len(job.layouts) >= LAYOUTS_KEPT:
            job.layouts.pop(next(iter(job.layouts)))
        job.layouts[key] = lay_out(model_of(job.spec, ways), len(names), None, speeds)
    return job.layouts[key]


def plan_ahead(job: Job) -> None:
    """While all is well, plan for the loss of each node: so that it need not be done while everybody waits."""
    plan = job.plan
    if plan is None or not plan.stages or job.attempt is not None or job.restoring is not None:
        return
    for node in dict.fromkeys(member.node for member in plan.members):
        left = [member.worker for member in plan.members if member.node != node]
        speeds = speeds_by_rank(job, left)
        if left and (len(left), tuple(sorted(speeds.items()))) not in job.layouts:
            _anew(job, left)
            return  # one at a time: others wait to be heard


def speeds_by_rank(job: Job, names: Sequence[str]) -> dict[int, float]:
    """Return the speeds of those that are not as fast as the others."""
    return {rank: job.speeds[name] for rank, name in enumerate(names) if name in job.speeds}


def _kept_stages(before: Plan, names: Sequence[str]) -> list[Stage]:
    """The stages of a world with those who are left; newcomers go where the fewest are."""
    ranks: list[list[int]] = [[] for _ in before.stages]
    new = []
    for rank, name in enumerate(names):
        old = before.rank_of(name)
        if old is None:
            new.append(rank)
        else:
            ranks[before.stage_of(old)].append(rank)
    for rank in new:
        min(ranks, key=len).append(rank)
    return [Stage(s.first, s.last, tuple(members)) for s, members in zip(before.stages, ranks, strict=True)]


def is_whole(job: Job, plan: Plan, holders: Iterable[str]) -> bool:
    """Whether workers that hold what is theirs in a world hold the whole state together; not asked of other jobs.

    Of a pipeline whose layers were on their way, nobody can tell who has what.
    """
    assert job.spec is not None
    if not job.spec.is_pipeline:
        return True
    if job.unsettled:
        return False
    names = set(holders)
    return all(any(plan.members[rank].worker in names for rank in stage.ranks) for stage in plan.stages)


def note_plan(job: Job, before: Plan | None, plan: Plan) -> None:
    """A generation follows another: layers may be on their way from now on, or made from others."""
    handed = handovers(before, plan) if before is not None and plan.kind is PlanKind.SWITCH else ()
    job.unsettled = plan.generation if handed or plan.moves or plan.is_recut else 0
    job.rebuilt = plan.rebuilt


def note_committed(job: Job, before: Plan | None, plan: Plan) -> None:
    """A generation was committed just now: whoever gets some of its layers holds nothing yet."""
    job.no_layout = ""
    note_plan(job, before, plan)
    for member in plan.members:
        if plan.is_given_layers(member.rank):
            job.workers[member.worker].holds_state = False


def note_resumed(job: Job, generation: int) -> None:
    """A step was committed in a generation: all its members have voted on it, and so hold what is theirs."""
    if job.spec is None or not job.spec.is_pipeline or job.plan is None or job.plan.generation != generation:
        return
    job.unsettled = 0
    for worker in job.known(job.plan.members):
        worker.holds_state |= worker.alive


def final_digest(job: Job, left: Iterable[Leaving]) -> str | set[str]:
    """Return the digest of what a finished job has trained, or the different ones where workers do not agree.

    `left` is what workers said that hold the state and have left the loop. "" where nobody of a stage is among them: then what
    has been trained is not there as a whole, and the job is not finished.
    """
    digests = {leaving.digest for leaving in left}
    if job.spec is not None and job.spec.is_pipeline:
        return digest_of_parts(digests, len(job.spec.layers))
    return digests.pop() if len(digests) == 1 else digests
