"""The training script of `benchmarks.lowcomm` and `benchmarks.churn`: a small byte-level GPT whose replicas agree in some way.

Each worker appends JSON lines to DIR/<pid>.jsonl. At each commit: {"clock_s", "step", "local_steps", "rank", "generation", "lr",
"spread", "digest"}, the last of what user code sees of the model; at the end also the {"loss"} of what was agreed, on windows
that are never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

import elastic
from elastic import session as session_module
from elastic.sync.turns import TurnEngine
from examples.gpt import GPT, Windows

CONTEXT, REPLICAS, BATCH, DIM, LAYERS = 64, 4, 4, 64, 4
HELD_OUT = 512
RATE, RATE_MIN = 1.5e-3, 0.1
WARM_UP = 20
FRAGMENTS = 2
TURNS = 2
STRATEGIES = ("ddp", "diloco", "streaming_diloco", "noloco", "async")


class Dropping(TurnEngine):
    """Loses what replicas give with a probability: one whose turn is lost goes on from where it is, until its next."""

    share = 0.0

    def _reports(self, slot: int) -> bool:
        dice = zlib.crc32(f"{self.sampler.seed} {self.step} {slot}".encode()) / 2**32
        return super()._reports(slot) and dice >= self.share


def sync_of(arguments: argparse.Namespace) -> Any:
    """Return the way to agree that the flags ask for."""
    every, quantize, dynamic = arguments.every, arguments.quantize or None, arguments.dynamic
    match arguments.sync:
        case "diloco":
            nesterov = arguments.momentum > 0.5
            return elastic.sync.DiLoCo(
                every, arguments.outer_lr, arguments.momentum, nesterov, quantize, dynamic=dynamic
            )
        case "streaming_diloco":
            return elastic.sync.StreamingDiLoCo(
                every * FRAGMENTS, FRAGMENTS, arguments.overlap, arguments.mixing, outer_lr=arguments.outer_lr,
                momentum=arguments.momentum, nesterov=arguments.momentum > 0.5, quantize=quantize, dynamic=dynamic,
            )  # fmt: skip
        case "noloco":
            return elastic.sync.NoLoCo(every, mean_every=arguments.mean_every, quantize=quantize, dynamic=dynamic)
        case "async":
            return elastic.sync.AsyncLocalSGD(
                every * arguments.turns, arguments.turns, arguments.outer_lr, arguments.momentum, quantize=quantize
            )
        case _:
            return elastic.sync.AllReduce()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", choices=STRATEGIES, required=True)
    parser.add_argument("--every", type=int, default=10, help="local steps of a round")
    parser.add_argument("--outer-lr", type=float, default=0.7)
    parser.add_argument("--momentum", type=float, default=0.3, help="above 0.5 Nesterov's")
    parser.add_argument("--mixing", type=float, default=0.0)
    parser.add_argument("--overlap", type=int, default=0)
    parser.add_argument("--mean-every", type=int, default=1)
    parser.add_argument("--quantize", default="")
    parser.add_argument("--turns", type=int, default=TURNS, help="of async")
    parser.add_argument("--drop", type=float, default=0.0, help="with async the share of what replicas give that is lost")
    parser.add_argument("--dynamic", action="store_true", help="deal rounds by speed")
    parser.add_argument("--local-steps", type=int, default=400, help="of each replica, in all")
    parser.add_argument("--slots", type=int, default=REPLICAS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="begin with these")
    parser.add_argument("--save", type=Path, help="write what was agreed")
    parser.add_argument("--until", type=Path, help="go on until this file exists, with a constant rate")
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args()

    if arguments.drop:
        Dropping.share = arguments.drop
        session_module.TurnEngine = Dropping  # type: ignore[misc]
    session = elastic.join()
    torch.manual_seed(0)
    model: Any = GPT(DIM, LAYERS, CONTEXT, dropout=0.0)
    if arguments.weights:
        model.load_state_dict(torch.load(arguments.weights, weights_only=True))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    total = arguments.local_steps

    def share_of_rate(step: int) -> float:
        falls = RATE_MIN + (1 - RATE_MIN) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
        return min(1.0, (step + 1) / WARM_UP) * (1.0 if arguments.until or arguments.save else falls)

    scheduler: Any = LambdaLR(optimizer, share_of_rate)
    text = Windows(CONTEXT)
    train = Subset(text, range(len(text) - HELD_OUT))
    sync = sync_of(arguments)
    every = 1 if arguments.sync == "ddp" else arguments.every
    loader: Any = DataLoader(train, batch_size=BATCH, shuffle=True)
    model, optimizer, scheduler, loader = session.prepare(
        model, optimizer, scheduler, loader, slots=arguments.slots, virtual_replicas=arguments.slots, seed=arguments.seed,
        sync=sync,
    )  # fmt: skip
    arguments.log.mkdir(parents=True, exist_ok=True)

    def is_last() -> bool:
        if arguments.until:
            return bool(arguments.until.exists())
        return bool((session.step + 1) * every >= total)

    with (arguments.log / f"{os.getpid()}.jsonl").open("a") as log:

        def write(**values: Any) -> None:
            line: dict[str, Any] = {"clock_s": time.monotonic(), "step": session.step, "local_steps": session.step * every}
            log.write(json.dumps(line | {"rank": session.rank, "generation": session.generation} | values) + "\n")
            log.flush()

        for _ in session.epochs(10**9):
            for inputs, targets in loader:
                if is_last():
                    session.stop()
                optimizer.zero_grad()
                loss = model(inputs, targets)
                session.log(loss=loss)
                loss.backward()
                session.clip_grad_norm_(1.0)
                optimizer.step()
                scheduler.step()
                if session.committed:
                    crc = 0
                    for parameter in model.parameters():
                        crc = zlib.crc32(parameter.detach().numpy().tobytes(), crc)
                    write(lr=scheduler.get_last_lr()[0], spread=session.spread, digest=crc)
        session.close()
        pairs = [text[index] for index in range(len(text) - HELD_OUT, len(text))]
        with torch.no_grad():
            inputs, targets = (torch.stack([pair[place] for pair in pairs]) for place in range(2))
            write(loss=float(model(inputs, targets)))
        if arguments.save and session.is_main:
            torch.save(model.state_dict(), arguments.save)


if __name__ == "__main__":
    main()
