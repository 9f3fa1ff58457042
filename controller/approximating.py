"""Going on after the loss of a stage that nobody else holds, with layers made from those of its neighbours (CheckFree).

    a stage lost, no snapshot to be had -> blends (`recovery/approximation.py`) -> FENCE of the survivors: the newest step is
    redone, layers move among them, lost ones are made from others -> the ledger says which, from what

Only a job that allows it (`--approximate-recovery`) comes here, and only where nothing exact is newer than a checkpoint.
Nothing here decides what layers are made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from controller.attempts import open_generation
from controller.endings import end_job
from controller.events import Persist
from controller.job import Job
from controller.layouts import layout_for, ways_of
from elastic.domain import LayerError, Plan, PlanKind, Stage
from recovery.approximation import NoBlend, blends_for, check_stages, sentence
from recovery.pipelines import Layout, NoLayout, Ways


def may_found(job: Job, names: Sequence[str], now: float) -> bool:
    """Whether a first world of these members can do what was asked for; ends the job with the reason if not."""
    settings = job.settings
    asked = {
        "--approximate-recovery": settings.approximate,
        "--swap-ends": settings.swap_ends,
        "--skip-ratio": settings.skip_ratio > 0,
    }
    option = next((option for option, is_asked in asked.items() if is_asked), "")
    if not option:
        return True
    assert job.spec is not None
    fault = ""
    if not job.spec.is_pipeline:
        fault = "it is for pipelines (session.pipeline), and here each worker holds the whole model: leave it out"
    elif settings.approximate:
        layout = layout_for(job, PlanKind.FOUND, names, None)
        if not isinstance(layout, Layout):
            return True  # that is told elsewhere
        kept = {layer for copy in layout.copies for layer in range(copy.first, copy.last)}
        fault = check_stages(job.spec.layers, layout.stages, layout.ways.partners, kept)
        fault = f"{fault}: use more workers, give stages= in session.pipeline(), or leave it out" if fault else ""
    if fault:
        end_job(job, "failed", f"{option}: {fault}", now)
    return not fault


def rebuild(job: Job, reason: str, now: float, joining: Iterable[str] = ()) -> str:
    """Open a world of those who are left and of `joining`, with what is lost made from what is held.

    Returns "", or why that cannot be.
    """
    assert job.spec is not None
    plan = job.plan
    if plan is None or not job.spec.is_pipeline:
        return "the job is no pipeline"
    survivors = [worker for worker in job.known(plan.members) if worker.alive]
    if job.unsettled or not all(worker.holds_state for worker in survivors):
        return "layers were on their way"
    if any(worker.leaving for worker in survivors):
        return "the training loop has ended"
    here = {worker.id for worker in survivors}
    lost = [number for number, stage in enumerate(plan.stages) if not _held(plan, stage, here)]
    norms = dict(enumerate(stage_norms(job, plan)))
    ways = ways_of(job, plan.world_size)
    partners = ways.partners if isinstance(ways, Ways) else {}
    ranks = [member.rank for member in plan.members if member.worker in here]
    kept = {layer for rank in ranks for layer in plan.copied_by(rank)}
    blends = blends_for(
        job.spec.layers,
        plan.stages,
        lost,
        norms,
        job.settings.norm_exponent,
        partners=partners,
        kept=kept,
        moments=job.settings.averages_moments,
    )
    if isinstance(blends, NoBlend):
        return blends.reason
    names = [*(worker.id for worker in survivors), *joining]
    layout = layout_for(job, PlanKind.FENCE, names, plan, is_cut_anew=True)
    if isinstance(layout, NoLayout):
        return layout.reason
    job.restoring = job.suspicion = None
    open_generation(job, PlanKind.FENCE, names, f"{reason}; {sentence(blends)}", now, blends=blends)
    return ""


def stage_norms(job: Job, plan: Plan) -> list[float]:
    """The norm of each stage's newest gradient, as far as its members have shown it; else 0."""
    known = {worker.id: worker.status.gradient_norm for worker in job.known(plan.members)}
    return [max(known.get(plan.members[rank].worker, 0.0) for rank in stage.ranks) for stage in plan.stages]


def _held(plan: Plan, stage: Stage, here: set[str]) -> bool:
    return any(plan.members[rank].worker in here for rank in stage.ranks)


def tell_of_errors(job: Job, errors: Sequence[LayerError]) -> None:
    """A worker has made layers for the newest approximation: how far they are expected to be from what was lost."""
    if errors and job.approximations:
        words = "; ".join(f"layer {each.layer} is expected {each.error:.2f} of its norm from what was lost" for each in errors)
        if words not in job.approximations[-1]:
            job.approximations[-1] += f"; {words}"
            job.emit(Persist("approximation-judged", words, {"words": job.approximations[-1]}))


def tell_of_approximation(job: Job, plan: Plan, step: int) -> None:
    """A world with layers that were made from others is committed: nobody may train on them without knowing."""
    if plan.blends:
        words = f"after step {step} {sentence(plan.blends)}"
        job.approximations.append(words)
        made = {blend.layer for blend in plan.blends}
        stages = [n for n, stage in enumerate(plan.stages) if made & set(range(stage.first, stage.last))]
        job.approximated.update(stages)
        data = {"words": words, "step": step, "generation": plan.generation, "blends": plan.blends, "stages": stages}
        job.emit(Persist("approximated", words, data))
