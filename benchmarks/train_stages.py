"""The training script of `benchmarks.pipeline`: elastic's pipeline and torch's in turns, in the same two processes.

Each worker holds one stage of two copies of the same GPT, with AdamW: one that elastic's executor runs, one that the
Schedule1F1B of torch.distributed.pipelining runs over a gloo process group of its own, which the two workers form through a
file. Both copies begin with the same weights, are cut where elastic's controller cut, and see the same micro-batches in the
same order. A round has three blocks, in an order that is drawn anew each time (alike on both workers): elastic, torch, and
torch once more as the control. A step's time goes from the end of one optimizer step to the end of the next, so that
fetching and the loss's value are in it. Blocks begin with a barrier.

Each worker writes one JSON line per round to stage<N>.jsonl: {"layers": [first, last], "elastic_s", "torch_s", "control_s"},
with the times of all steps of each block. A round in which the controller moved layers is not written, and torch's copy is
cut anew after it. The last stage writes what the first steps' losses were to losses.json: {"elastic", "torch"}.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.data import DataLoader

import elastic
from elastic.pipeline.api import Pipeline
from examples.gpt import HEADS, VOCABULARY, Block, Windows
from examples.gpt_pipeline import Embed, Scores, loss_of

CONTEXT = 64
STAGES = 2
WARM_UP_STEPS = 5
TIMEOUT = timedelta(seconds=60)
BLOCK_S_MAX = 120.0


def layers_of(dim: int, blocks: int) -> list[nn.Module]:
    """Return the GPT of the examples as layers; without a tied weight, which torch's pipelines do not have, or dropout."""
    embed = Embed(nn.Embedding(VOCABULARY, dim), nn.Embedding(CONTEXT, dim))
    scores = Scores(nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY, bias=False))
    return [embed, *(Block(dim, HEADS, 0.0) for _ in range(blocks)), scores]


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of both sides."""
    return torch.optim.AdamW(parameters, lr=3e-4)


class TorchTraining:
    """The other side: what a script for torchrun does."""

    def __init__(self, layers: Sequence[nn.Module], stage: int, dataset: Windows, batch: int, slots: int) -> None:
        self._is_last = stage == STAGES - 1
        module = nn.Sequential(*layers)
        self._optimizer = optimizer_of(list(module.parameters()))
        self._schedule = Schedule1F1B(
            PipelineStage(module, stage, STAGES, torch.device("cpu")), n_microbatches=slots, loss_fn=loss_of
        )
        self._batches = self._endless(DataLoader(dataset, batch_size=batch * slots, drop_last=True))

    def _endless(self, loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    def step(self) -> float:
        """Train on the next global batch; returns its loss on the last stage, NaN elsewhere."""
        inputs, targets = next(self._batches)
        losses: list[Tensor] = []
        self._optimizer.zero_grad()
        if self._is_last:
            self._schedule.step(target=targets, losses=losses, return_outputs=False)
        else:
            self._schedule.step(inputs, return_outputs=False)
        self._optimizer.step()
        return float(torch.stack(losses).mean()) if losses else math.nan


class ElasticTraining:
    """A user's loop over a pipeline, a step at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._batches = iter(pipeline)

    def step(self) -> float:
        """Train on the next global batch; returns its loss."""
        next(self._batches)
        return self._pipeline.step()


def block(step: Callable[[], float], steps: int) -> list[float]:
    """Train some steps; returns the seconds of each."""
    times_s = []
    dist.barrier()
    last_s = time.perf_counter()
    for _ in range(steps):
        step()
        now_s = time.perf_counter()
        times_s.append(now_s - last_s)
        last_s = now_s
    return times_s


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="windows in a micro-batch")
    parser.add_argument("--slots", type=int, required=True, help="micro-batches in a step")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--block", type=int, required=True, help="steps in a block")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found and the file to meet at")
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace,
    session: elastic.Session,
    pipeline: Pipeline,
    cut: Callable[[range, int], TorchTraining],
) -> None:
    """Take turns, and write down how long each step took.

    Args:
        cut: Makes torch's side of the layers that are held here, and the number of the stage.
    """
    ours = ElasticTraining(pipeline)
    losses = {"elastic": [ours.step() for _ in range(WARM_UP_STEPS)]}
    held = pipeline.layers
    stage = 0 if held.start == 0 else STAGES - 1
    session.busy(BLOCK_S_MAX)
    store = FileStore(str(arguments.out / "meet"), STAGES)
    dist.init_process_group("gloo", store=store, rank=stage, world_size=STAGES, timeout=TIMEOUT)
    theirs = cut(held, stage)
    losses["torch"] = [theirs.step() for _ in range(WARM_UP_STEPS)]
    if stage == STAGES - 1:
        (arguments.out / "losses.json").write_text(json.dumps(losses))
    dice = random.Random(0)
    rounds = 0
    while rounds < arguments.rounds:
        sides = {"elastic_s": ours.step, "torch_s": theirs.step, "control_s": theirs.step}
        times: dict[str, list[float]] = {}
        for name in dice.sample(list(sides), len(sides)):
            session.busy(BLOCK_S_MAX)
            times[name] = block(sides[name], arguments.block)
        if pipeline.layers != held:
            held = pipeline.layers
            theirs = cut(held, stage)
            block(theirs.step, WARM_UP_STEPS)
            continue
        rounds += 1
        with (arguments.out / f"stage{stage}.jsonl").open("a") as file:
            file.write(json.dumps({"layers": [held.start, held.stop], **times}) + "\n")


def main() -> None:
    arguments = parse_arguments()
    session = elastic.join()
    dataset = Windows(CONTEXT)
    layers = layers_of(arguments.dim, arguments.layers)
    copies = copy.deepcopy(layers)
    loader = DataLoader(dataset, batch_size=arguments.batch, drop_last=True)
    pipeline = session.pipeline(layers, loss_of, optimizer_of, loader, slots=arguments.slots, stages=STAGES)

    def cut(held: range, stage: int) -> TorchTraining:
        return TorchTraining([copies[number] for number in held], stage, dataset, arguments.batch, arguments.slots)

    for _ in session.epochs(1):  # has far more steps than are taken
        measure(arguments, session, pipeline, cut)
        break


if __name__ == "__main__":
    main()
