"""A script that trains with NoLoCo, and writes down what each commit made of a worker's own parameters.

Each worker appends JSON lines to DIR/<pid>.jsonl at each commit: {"worker", "step", "generation", "rank", "world", "spread"},
{"before", "after"} as [phi, momentum] in lists of numbers, and the {"mean"} that user code sees. Runs until GO exists, and for
a number of steps at least.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elastic
from elastic.sync.noloco import PairEngine

EVERY, MEAN_EVERY = 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--go", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--pause-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    session = elastic.join()
    torch.manual_seed(1)
    inputs = torch.randn(1217, 6)
    targets = torch.sin(inputs.sum(1, keepdim=True)) + 0.3 * torch.randn(1217, 1)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.02)
    loader: Any = DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=True)
    sync = elastic.sync.NoLoCo(EVERY, mean_every=MEAN_EVERY, quantize=arguments.quantize)
    model, optimizer, loader = session.prepare(model, optimizer, loader, slots=arguments.slots, sync=sync)
    engine = session._engine
    assert isinstance(engine, PairEngine)
    slow = engine._slow

    def own() -> list[list[float]]:
        return [torch.cat([part.flatten() for part in slow.of(key)]).tolist() for key in ("phi", "momentum")]

    arguments.log.mkdir(parents=True, exist_ok=True)
    before, counted = own(), (-1, -1)
    with (arguments.log / f"{os.getpid()}.jsonl").open("a") as log:
        for _ in session.epochs(10**6):
            for x, y in loader:
                if (session.generation, session.step) != counted:  # a joiner's first batch is of no world
                    before, counted = own(), (session.generation, session.step)
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                session.log(loss=loss)
                loss.backward()
                if session.step + 1 >= arguments.steps and arguments.go.exists():
                    session.stop()
                optimizer.step()
                time.sleep(arguments.pause_ms / 1000 / EVERY)
                if session.committed:
                    plan = engine._committed_plan
                    assert plan is not None
                    worker = engine.coordinator.settings.worker
                    line: dict[str, Any] = {"worker": worker, "step": session.step}
                    # Of the world that committed it: a new one may have been entered since.
                    line |= {"generation": plan.generation, "rank": plan.rank_of(worker), "world": plan.world_size}
                    line |= {"spread": session.spread, "loss": session.loss, "before": before, "after": own()}
                    mean = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
                    log.write(json.dumps(line | {"mean": mean, "slots": engine.own_slots()}) + "\n")
                    log.flush()
    session.close()


if __name__ == "__main__":
    main()
