"""Train the byte-level GPT of `gpt.py` as a pipeline: each worker holds some of its layers, and they are dealt anew when
workers come and go.

    elastic run --nproc-per-node 4 --snapshot-every 1 examples/gpt_pipeline.py --slots 8
    python examples/gpt_pipeline.py

Embedding and output layer share a weight, at the two ends of the pipeline. What `--save` writes is the whole model, with the
names that it has in `gpt.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import elastic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, and `examples` is above
from examples.gpt import GPT, Windows, learning_rate


class Embed(nn.Module):
    """The first layer: bytes [batch, length] to vectors [batch, length, dim]."""

    def __init__(self, tokens: nn.Embedding, positions: nn.Embedding) -> None:
        super().__init__()
        self.tokens, self.positions = tokens, positions

    def forward(self, inputs: Tensor) -> Tensor:
        x: Tensor = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        return x


class Scores(nn.Module):
    """The last layer: vectors [batch, length, dim] to scores of the next byte [batch, length, 256]."""

    def __init__(self, norm: nn.LayerNorm, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(x))
        return scores


class LayeredGPT(GPT):
    """The same model, which also says how it is taken apart."""

    def pipeline_layers(self) -> list[nn.Module]:
        """Return the layers, in order; the first and the last one share a weight."""
        return [Embed(self.tokens, self.positions), *self.blocks, Scores(self.norm, self.head)]

    def pipeline_key(self, layer: int, key: str) -> str:
        """Return the model's own name of what a layer calls `key`."""
        return f"blocks.{layer - 1}.{key}" if 0 < layer <= len(self.blocks) else key


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a slot."""
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description="Train a small GPT as a pipeline.")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=64, help="bytes in a window")
    parser.add_argument("--steps", type=int, default=200, help="steps to train")
    parser.add_argument("--batch", type=int, default=4, help="windows in one slot")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--slots", type=int, default=0, help="slots in a step [twice the workers at the start]")
    parser.add_argument("--virtual-replicas", type=int, default=0, help="blocks of slots [the widest stage's workers]")
    parser.add_argument("--stages", type=int, default=0, help="stages that the layers are cut into [one per worker]")
    parser.add_argument("--schedule", choices=["1f1b", "gpipe"], default="1f1b", help="order of forwards and backwards")
    parser.add_argument("--recompute", action="store_true", help="keep no activations, compute forwards again")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=None, help="seed of everything random [the job's]")
    parser.add_argument("--timeline", type=Path, help="file for a JSON line per step")
    parser.add_argument("--save", type=Path, help="file for the trained model's state_dict")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    session = elastic.join()

    pipeline = session.pipeline(
        LayeredGPT(arguments.dim, arguments.layers, arguments.context, arguments.dropout),
        loss_of,
        lambda parameters: torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=0.1),
        DataLoader(Windows(arguments.context), batch_size=arguments.batch, shuffle=True),
        scheduler_fn=lambda optimizer: LambdaLR(optimizer, lambda step: learning_rate(step, arguments.steps)),
        slots=arguments.slots, virtual_replicas=arguments.virtual_replicas, stages=arguments.stages,
        schedule=arguments.schedule, recompute=arguments.recompute, clip_grad_norm=1.0, seed=arguments.seed,
    )  # fmt: skip

    def report(step: int) -> None:
        if step % 10 == 0 or step == arguments.steps:
            print(f"step {step}: loss {session.loss:.4f}, {session.world_size} workers", flush=True)
        if arguments.timeline is not None:
            line = {"clock_s": time.monotonic(), "step": step, "generation": session.generation}
            line |= {"world_size": session.world_size, "rank": session.rank}
            with arguments.timeline.open("a") as file:
                file.write(json.dumps(line) + "\n")

    session.on_commit(report)
    held = range(0)
    for _ in session.epochs(arguments.steps):  # an epoch has at least one step, so these are enough
        for _ in pipeline:
            pipeline.step()
            if pipeline.layers != held:
                held = pipeline.layers
                print(f"rank {session.rank} holds layers {held.start} to {held.stop - 1}", flush=True)
            if session.step >= arguments.steps:
                break

    if arguments.save is not None:
        state = pipeline.state_dict()  # every worker takes part, since each has only some of it
        if session.is_main:
            torch.save(state, arguments.save)


if __name__ == "__main__":
    main()
