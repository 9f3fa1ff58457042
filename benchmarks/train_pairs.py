"""The training script of `benchmarks.overhead`: elastic's steps and plain DDP's in turns, in one process.

Each worker holds two copies of the GPT of the examples with an AdamW each: one prepared by elastic, one
wrapped in DistributedDataParallel over a gloo process group of its own, which this job's workers form through
a file. A round has three blocks, in an order that is drawn anew each time (alike on all workers): elastic,
DDP, and DDP once more as the control. Both sides run a user's ordinary loop over a DataLoader, and a step's
time goes from the end of one optimizer.step() to the end of the next, so that fetching is in it. Blocks begin
with a barrier.

Each worker writes one JSON line per round: {"round", "rank", "elastic_s", "ddp_s", "control_s"}, with the
times of all steps of each block.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import elastic
from examples.gpt import GPT, Windows

WARM_UP_STEPS = 5
TIMEOUT = timedelta(seconds=60)


class PlainTraining:
    """The other side: what a script for torchrun does."""

    def __init__(self, dataset: Windows, batch: int, rank: int, world_size: int) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(GPT())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(dataset, world_size, rank)
        self._batches = self._endless(DataLoader(dataset, batch_size=batch, sampler=sampler, drop_last=True))

    def _endless(self, loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    def block(self, steps: int) -> list[float]:
        """Train some steps; returns the seconds of each."""
        times_s = []
        last_s = begin()
        for _ in range(steps):
            inputs, targets = next(self._batches)
            loss = self.model(inputs, targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            now_s = time.perf_counter()
            times_s.append(now_s - last_s)
            last_s = now_s
        return times_s


def begin() -> float:
    """Wait for all workers; returns the time at which a block begins."""
    dist.barrier()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reduction", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the workers' lines and the file to meet at"
    )
    arguments = parser.parse_args()

    session = elastic.join()
    dataset = Windows(64)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    loader = DataLoader(dataset, batch_size=arguments.batch, shuffle=True, drop_last=True)
    model, optimizer, loader = session.prepare(model, optimizer, loader, reduction=arguments.reduction)

    plain: PlainTraining | None = None
    dice = random.Random(0)
    left = WARM_UP_STEPS  # elastic steps left in the present block
    rounds, last_s = -1, 0.0
    times: dict[str, list[float]] = {}
    todo: list[str] = []  # blocks of the present round that are still to come
    for _ in session.epochs(10**9):
        for inputs, targets in loader:
            loss = model(inputs, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            now_s = time.perf_counter()
            times.setdefault("elastic_s", []).append(now_s - last_s)
            last_s = now_s
            left -= 1
            if left:
                continue
            # The elastic block is over: run DDP's blocks until elastic's turn comes again.
            if plain is None:
                store = FileStore(str(arguments.out / "meet"), session.world_size)
                dist.init_process_group(
                    "gloo", store=store, rank=session.rank, world_size=session.world_size, timeout=TIMEOUT
                )
                plain = PlainTraining(dataset, arguments.batch, session.rank, session.world_size)
                plain.block(WARM_UP_STEPS)
                times, todo = {}, []
            while True:
                if not todo:
                    if rounds >= 0:
                        with (arguments.out / f"rank{session.rank}.jsonl").open("a") as file:
                            file.write(json.dumps({"round": rounds, "rank": session.rank, **times}) + "\n")
                    rounds += 1
                    times = {}
                    todo = dice.sample(["elastic_s", "ddp_s", "control_s"], 3)
                if rounds == arguments.rounds:
                    break
                name = todo.pop()
                if name == "elastic_s":
                    left = arguments.block
                    last_s = begin()
                    break
                times[name] = plain.block(arguments.block)
            if rounds == arguments.rounds:
                break


if __name__ == "__main__":
    main()
