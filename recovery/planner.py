"""A program that plans pipelines for `elastic plan`: one question as JSON on its input, one answer on its output.

    {"model": {...}, "workers": N, "held": {rank: [first, last]}, "speeds": {rank: speed}, "nodes": {node: [rank, ...]}}

The answer has the layout with every worker's actions, the candidates that it was chosen from, and what would follow the
loss of each node. It plans as the controller does, and nothing that it says is carried out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from elastic.domain import LayerProfile, Stage
from elastic.pipeline.actions import Schedule, make_actions
from recovery.pipelines import Layout, Model, NoLayout, best_of, candidates_for, lay_out, rerouted
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
        "losses": [_loss(model, layout, node, ranks, speeds) for node, ranks in question.get("nodes", {}).items()],
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
    )


def _brief(layout: Layout) -> dict[str, Any]:
    return {
        "stages": [[stage.first, stage.last, stage.ranks] for stage in layout.stages],
        "step_s": layout.prediction.step_s,
        "bubble": layout.prediction.bubble,
        "moved_bytes": layout.moved_bytes,
        "reason": layout.reason,
    }


def _plain(model: Model, layout: Layout) -> dict[str, Any]:
    actions = make_actions(layout.stages, layout.routes, model.schedule)
    return _brief(layout) | {
        "routes": layout.routes,
        "busy_s": layout.prediction.busy_s,
        "memory_bytes": layout.prediction.memory_bytes,
        "actions": {
            rank: [[action.kind.value, action.slot, action.peer] for action in listed]
            for rank, listed in actions.items()
        },
    }


def _loss(model: Model, layout: Layout, node: str, ranks: list[int], speeds: Mapping[int, float]) -> dict[str, Any]:
    """What would follow the loss of a node with these ranks."""
    left = [rank for stage in layout.stages for rank in stage.ranks if rank not in ranks]
    number = {rank: place for place, rank in enumerate(sorted(left))}
    stages = [Stage(s.first, s.last, tuple(number[r] for r in s.ranks if r in number)) for s in layout.stages]
    slower = {number[rank]: speed for rank, speed in speeds.items() if rank in number}
    if left and all(stage.ranks for stage in stages):
        after: Layout | NoLayout = rerouted(model, stages, "its slots go to the others of its stage", slower)
        how = "live replica"
    elif left:
        after, how = lay_out(model, len(left), None, slower), "snapshot"
    else:
        after, how = NoLayout("no worker would be left"), "stop"
    if isinstance(after, NoLayout):
        return {"node": node, "rung": how, "error": after.reason}
    return {"node": node, "rung": how, **_brief(after)}


def main() -> int:
    """Answer the question on the standard input."""
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
