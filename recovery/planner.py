"""A program that plans pipelines for `elastic plan`: one question as JSON on its input, one answer on its output.

    {"model": {...}, "workers": N, "held": {rank: [first, last]}, "speeds": {rank: speed}, "nodes": {node: [rank, ...]},
     "recovery": {"snapshots": bool, "parity": M, "checkpoints": bool, "approximates": bool, "norms": [...], ...}}

The answer has the layout with every worker's actions, the candidates that it was chosen from, and what would follow the
loss of each node: the rung of the recovery ladder, what it costs, and why none before it. It plans as the controller does,
and nothing that it says is carried out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from elastic.domain import LayerProfile, Stage
from elastic.pipeline.actions import Schedule, make_actions
from recovery.approximation import NoBlend, blends_for, sentence
from recovery.ladder import Rung
from recovery.pipelines import Layout, Model, NoLayout, Ways, best_of, candidates_for, lay_out, rerouted
from recovery.simulation import Link


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to a question, or {"error": why there is none}."""
    model = _model(question["model"])
    workers = question["workers"]
    held = {int(rank): range(*layers) for rank, layers in question.get("held", {}).items()}
    speeds = {int(rank): speed for rank, speed in question.get("speeds", {}).items()}
    if "stages" in question:
        stages = tuple(Stage(first, last, tuple(ranks)) for first, last, ranks in question["stages"])
        layout: Layout | NoLayout = rerouted(model, stages, "as it is", speeds)
        candidates: list[Layout] = []
    else:
        candidates, _ = candidates_for(model, workers, held, speeds)
        layout = best_of(candidates) if candidates else lay_out(model, workers, held, speeds)
    if isinstance(layout, NoLayout):
        return {"error": layout.reason}
    return {
        "layout": _plain(model, layout),
        "candidates": [_brief(each) | {"is_chosen": each is layout} for each in candidates],
        "losses": [
            _loss(model, layout, node, ranks, speeds, question.get("recovery", {}))
            for node, ranks in question.get("nodes", {}).items()
        ],
    }


def _model(fields: Mapping[str, Any]) -> Model:
    return Model(
        layers=tuple(LayerProfile(**layer) for layer in fields["layers"]),
        slots=fields["slots"],
        virtual_replicas=fields.get("virtual_replicas", 1),
        stages=fields.get("stages", 0),
        memory_bytes=fields.get("memory_bytes", 0),
        schedule=Schedule(fields.get("schedule") or Schedule.ONE_F_ONE_B),
        link=Link(**fields.get("link", {})),
        ways=_ways(fields.get("ways", {})),
    )


def _ways(fields: Mapping[str, Any]) -> Ways:
    paths = tuple(tuple(path) for path in fields.get("paths", ()))
    return Ways(paths, tuple(fields.get("path_of", ())), bool(fields.get("copies_ends")))


def _brief(layout: Layout) -> dict[str, Any]:
    return {
        "stages": [[stage.first, stage.last, stage.ranks] for stage in layout.stages],
        "step_s": layout.prediction.step_s,
        "bubble": layout.prediction.bubble,
        "moved_bytes": layout.moved_bytes,
        "reason": layout.reason,
    }


def _plain(model: Model, layout: Layout) -> dict[str, Any]:
    actions = make_actions(layout.stages, layout.routes, model.schedule, (), model.ways.of_slots)
    return _brief(layout) | {
        "routes": layout.routes,
        "busy_s": layout.prediction.busy_s,
        "memory_bytes": layout.prediction.memory_bytes,
        "actions": {
            rank: [[action.kind.value, action.slot, action.peer] for action in listed]
            for rank, listed in actions.items()
        },
    }


def _loss(
    model: Model,
    layout: Layout,
    node: str,
    ranks: list[int],
    speeds: Mapping[int, float],
    recovery: Mapping[str, Any],
) -> dict[str, Any]:
    """What would follow the loss of a node with these ranks."""
    left = [rank for stage in layout.stages for rank in stage.ranks if rank not in ranks]
    number = {rank: place for place, rank in enumerate(sorted(left))}
    stages = [Stage(s.first, s.last, tuple(number[r] for r in s.ranks if r in number)) for s in layout.stages]
    slower = {number[rank]: speed for rank, speed in speeds.items() if rank in number}
    lost = [place for place, stage in enumerate(stages) if not stage.ranks]
    rung, costs, passed_over = _rung(model, layout, lost, recovery)
    after: Layout | NoLayout = NoLayout("the job ends")
    if rung is Rung.LIVE_REPLICA:
        after = rerouted(model, stages, "its slots go to the others of its stage", slower)
    elif rung is not Rung.STOP:
        after = lay_out(model, len(left), None, slower) if left else NoLayout("it needs a worker first")
    told = {"node": node, "rung": rung.value, "costs": costs, "passed_over": passed_over}
    return told | ({"error": after.reason} if isinstance(after, NoLayout) else _brief(after))


def _rung(
    model: Model, layout: Layout, lost: list[int], recovery: Mapping[str, Any]
) -> tuple[Rung, str, list[str]]:
    """The rung that a loss of these stages leads to, what it costs, and why none before it."""
    if not lost:
        return Rung.LIVE_REPLICA, "the interrupted step is done again", []
    gone = ", ".join(str(place) for place in lost)
    passed_over = [f"{Rung.LIVE_REPLICA.value} (nobody else holds stage {gone})"]
    if recovery.get("parity"):
        return Rung.ERASURE_DECODE, "one committed step or two are done again", passed_over
    without = "no parity of it is kept (--redundancy)" if recovery.get("snapshots") else "none are taken (--snapshot-every)"
    passed_over.append(f"snapshots ({without})")
    exponent = recovery.get("norm_exponent", 1.0)
    norms = dict(enumerate(recovery.get("norms", ())))
    left = {rank for place, stage in enumerate(layout.stages) if place not in lost for rank in stage.ranks}
    kept = {n for copy in layout.copies if left & {*copy.ranks} for n in range(copy.first, copy.last)}
    blends = blends_for(model.layers, layout.stages, lost, norms, exponent, partners=model.ways.partners, kept=kept)
    if recovery.get("approximates") and not isinstance(blends, NoBlend):
        exact = f"; layers {', '.join(map(str, sorted(kept & _layers_of(layout, lost))))} are kept in duplicate" if kept else ""
        return Rung.NEIGHBOUR_AVERAGE, f"nothing is done again, but {sentence(blends)}{exact}", passed_over
    reason = blends.reason if recovery.get("approximates") and isinstance(blends, NoBlend) else "not allowed"
    passed_over.append(f"{Rung.NEIGHBOUR_AVERAGE.value} ({reason})")
    if recovery.get("checkpoints"):
        return Rung.CHECKPOINT, "all steps since the newest one are done again", passed_over
    passed_over.append(f"{Rung.CHECKPOINT.value} (none are written)")
    return Rung.STOP, "everything is done again, from step 0", passed_over


def _layers_of(layout: Layout, stages: Collection[int]) -> set[int]:
    return {layer for number in stages for layer in range(layout.stages[number].first, layout.stages[number].last)}


def main() -> int:
    """Answer the question on the standard input."""
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
