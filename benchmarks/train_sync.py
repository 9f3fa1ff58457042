"""The training script of `benchmarks.lowcomm`: a small byte-level GPT whose replicas agree each step, or after some.

Each worker appends JSON lines to DIR/<pid>.jsonl: {"clock_s", "step", "local_steps", "rank"} at each commit; the last has the
{"loss"} of what was agreed, on windows that are never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

import elastic
from examples.gpt import GPT, Windows

CONTEXT, REPLICAS, BATCH = 64, 4, 4
HELD_OUT = 128
RATE = 1.5e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", choices=["ddp", "diloco"], required=True)
    parser.add_argument("--every", type=int, default=10, help="local steps of a round")
    parser.add_argument("--outer-lr", type=float, default=0.7)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--local-steps", type=int, default=400, help="of each replica, in all")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args()

    session = elastic.join()
    torch.manual_seed(arguments.seed)
    model = GPT(arguments.dim, arguments.layers, CONTEXT, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    total = arguments.local_steps
    scheduler = LambdaLR(optimizer, lambda step: 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / total)))
    text = Windows(CONTEXT)
    train = Subset(text, range(len(text) - HELD_OUT))
    is_local = arguments.sync == "diloco"
    every = arguments.every if is_local else 1
    sync = elastic.sync.DiLoCo(every, arguments.outer_lr, arguments.momentum) if is_local else elastic.sync.AllReduce()
    model, optimizer, scheduler, loader = session.prepare(
        model,
        optimizer,
        scheduler,
        DataLoader(train, batch_size=BATCH, shuffle=True),
        slots=REPLICAS,
        virtual_replicas=REPLICAS,
        seed=arguments.seed,
        sync=sync,
    )
    arguments.log.mkdir(parents=True, exist_ok=True)
    with (arguments.log / f"{os.getpid()}.jsonl").open("a") as log:

        def write(**values: float) -> None:
            line = {"clock_s": time.monotonic(), "step": session.step, "local_steps": session.step * every}
            log.write(json.dumps(line | {"rank": session.rank} | values) + "\n")
            log.flush()

        for _ in session.epochs(10**9):
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = model(inputs, targets)
                session.log(loss=loss)
                loss.backward()
                session.clip_grad_norm_(1.0)
                optimizer.step()
                scheduler.step()
                if session.committed:
                    write()
                    if session.step * every >= total:
                        break
            if session.step * every >= total:
                break
        session.close()
        pairs = [text[index] for index in range(len(text) - HELD_OUT, len(text))]
        with torch.no_grad():
            inputs, targets = (torch.stack([pair[place] for pair in pairs]) for place in range(2))
            write(loss=float(model(inputs, targets)))


if __name__ == "__main__":
    main()
