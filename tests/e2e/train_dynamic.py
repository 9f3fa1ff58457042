"""A script whose rounds are dealt by speed, and what it saw of them.

Each worker appends a JSON line to DIR/<pid>.jsonl at each commit: {"worker", "step", "epoch", "rank", "is_short"}, how many local
steps of the round were {"dealt", "taken"} and how many samples {"dealt_samples", "taken_samples"}, the {"seconds"} since the last
commit, and the {"digest"} of the model, the {"loss"} and the {"lr"} that user code sees. Ends with an epoch in whose last round
GO exists.
"""

from __future__ import annotations

import argparse
import hashlib
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

EVERY, BATCH_SIZE, SAMPLES = 6, 4, 1216
SYNCS = {
    "diloco": elastic.sync.DiLoCo(EVERY, 0.7, 0.3, nesterov=False, dynamic=True),
    "streaming": elastic.sync.StreamingDiLoCo(2 * EVERY, 2, mixing=0.5, quantize="int8", dynamic=True),
    "noloco": elastic.sync.NoLoCo(EVERY, mean_every=1, dynamic=True),
    "async": elastic.sync.AsyncLocalSGD(2 * EVERY, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--go", type=Path, required=True)
    parser.add_argument("--sync", choices=SYNCS, default="diloco")
    parser.add_argument("--pause-ms", type=float, default=4.0, help="of each local step")
    parser.add_argument("--slow-rank", type=int, default=-1, help="whose pauses are four times as long")
    parser.add_argument("--stall-at", type=int, default=0, help="round in which the last rank's pauses are STALL_S")
    parser.add_argument("--stall-s", type=float, default=0.0)
    parser.add_argument("--plain", action="store_true", help="without batch norm, which sees a worker's share of a batch")
    parser.add_argument("--slots", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the model's numbers at the end")
    arguments = parser.parse_args()
    session = elastic.join()
    torch.manual_seed(1)
    inputs = torch.randn(SAMPLES, 6)
    targets = torch.sin(inputs.sum(1, keepdim=True)) + 0.3 * torch.randn(SAMPLES, 1)
    hidden = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
    norm = nn.Identity() if arguments.plain else nn.BatchNorm1d(8)
    model: Any = nn.Sequential(hidden[0], nn.Tanh(), hidden[1], norm, nn.Linear(8, 1))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9999)
    loader: Any = DataLoader(TensorDataset(inputs, targets), batch_size=BATCH_SIZE, shuffle=True)
    model, optimizer, scheduler, loader = session.prepare(
        model, optimizer, scheduler, loader, slots=arguments.slots, sync=SYNCS[arguments.sync]
    )
    engine: Any = session._engine
    arguments.log.mkdir(parents=True, exist_ok=True)
    taken = samples = 0
    dealt: list[Any] = []
    since = time.monotonic()
    with (arguments.log / f"{os.getpid()}.jsonl").open("a") as log:
        for epoch in session.epochs(10**6):
            for x, y in loader:
                slot = engine.slot
                if slot.counts and (not dealt or dealt[0] != slot.step):
                    mine = [] if slot.slot not in engine.own_slots() else engine.pieces(slot.step, slot.slot)
                    dealt, taken, samples = [slot.step, mine], 0, 0
                loss = F.mse_loss(model(x), y)
                session.log(loss=loss)
                loss.backward()
                factor = 4 if session.rank == arguments.slow_rank else 1
                if session.step + 1 == arguments.stall_at and session.rank == session.world_size - 1:
                    time.sleep(arguments.stall_s)
                time.sleep(factor * arguments.pause_ms / 1000)
                is_own = bool(dealt and dealt[1])
                taken, samples = taken + is_own, samples + len(x) * is_own
                if (session.step + 1) % len(loader) == 0 and arguments.go.exists():
                    session.stop()
                optimizer.step()
                scheduler.step()
                if session.committed:
                    now = time.monotonic()
                    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
                    line: dict[str, Any] = {"worker": engine.coordinator.settings.worker, "rank": session.rank}
                    line |= {"step": session.step, "epoch": epoch}
                    line |= {"dealt": max(1, len(dealt[1])), "taken": taken, "seconds": now - since, "digest": digest}
                    line |= {"dealt_samples": sum(len(ids) for _, ids in dealt[1]), "taken_samples": samples}
                    line |= {"loss": session.loss, "lr": optimizer.param_groups[0]["lr"]}
                    line |= {"is_short": session.step % len(loader) == 0}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    since = now
    session.close()
    if arguments.out and session.is_main:
        arguments.out.write_text(json.dumps([value for p in model.parameters() for value in p.detach().flatten().tolist()]))


if __name__ == "__main__":
    main()
