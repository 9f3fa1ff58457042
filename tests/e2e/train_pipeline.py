"""What the end-to-end pipelines train: layers of every kind that a cut may stumble over.

Tied weights at both ends, batch norm, dropout, two tensors from layer to layer, a layer that writes into its input, one
without parameters, a clipped gradient and a schedule. As `train.py`, it never ends while the file of --go is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import elastic

TOKENS, WIDTH, LENGTH = 24, 16, 6
HELD_STEPS = 8


class Embed(nn.Module):
    """Tokens to vectors, and their mean beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(tokens)
        return x, x.mean(1)


class Mix(nn.Module):
    """A block with dropout and batch norm, that passes something by."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(WIDTH, WIDTH), nn.Identity() if plain else nn.BatchNorm1d(LENGTH)
        self.drop = nn.Dropout(0.0 if plain else 0.1)

    def forward(self, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.drop(torch.tanh(self.up(self.norm(x)))) + mean[:, None]
        return x, mean


class _Waiting(torch.autograd.Function):
    """Passes a tensor on, after a while each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wait: Wait) -> Tensor:
        ctx.wait = wait
        wait.sleep()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.wait.sleep()
        return gradient, None


class Wait(nn.Module):
    """A block that takes its time without a processor; longer on the node that a file names, with a factor."""

    def __init__(self, inner: nn.Module, wait_s: float, slow: Path | None) -> None:
        super().__init__()
        self.inner, self.wait_s, self.slow = inner, wait_s, slow

    def sleep(self) -> None:
        factor = 1.0
        if self.slow is not None and self.slow.exists():
            node, _, text = self.slow.read_text().partition(" ")
            factor = float(text) if os.environ.get("ELASTIC_WORKER", "").startswith(f"{node}/") else 1.0
        time.sleep(factor * self.wait_s)

    def forward(self, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        x, mean = self.inner(x, mean)
        return _Waiting.apply(x, self), mean


class Join(nn.Module):
    """From two tensors to one."""

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        return x * mean[:, None].sigmoid()


class Head(nn.Module):
    """Vectors to tokens, by the table that they came from."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def layers_of(
    blocks: int, *, plain: bool, wait_s: float = 0.0, slow: Path | None = None, tied: bool = True
) -> list[nn.Module]:
    embed = Embed()
    mixing: list[nn.Module] = [Mix(plain=plain) for _ in range(blocks)]
    if wait_s:
        mixing = [Wait(block, wait_s, slow) for block in mixing]
    return [embed, *mixing, Join(), nn.ReLU(inplace=True), nn.LayerNorm(WIDTH), Head(embed.table if tied else Embed().table)]


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.float().flatten(0, 1), targets.flatten())


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1217)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--slots", type=int, default=6)
    parser.add_argument("--virtual-replicas", type=int, default=2)
    parser.add_argument("--stages", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--plain", action="store_true", help="Neither dropout nor batch norm.")
    parser.add_argument("--wait-ms", type=float, default=0.0, help="Each block waits so long each way.")
    parser.add_argument("--slow", type=Path, help="File with NODE FACTOR: there they wait longer.")
    parser.add_argument("--pause-ms", type=float, default=60.0, help="Sleep per step until --go exists.")
    parser.add_argument("--trace", type=Path, help="Directory for what each process has of the first layer after each step.")
    parser.add_argument("--stray", type=Path, help="Whoever removes this file makes a call alone that all have to make.")
    parser.add_argument("--diloco", type=int, default=0, help="Local steps of a round; the ends are not tied then.")
    parser.add_argument("--random-routing", action="store_true")
    parser.add_argument("--quantize")
    parser.add_argument("--go", type=Path)
    parser.add_argument("--out", type=Path, help="Directory for what each process ended with.")
    args = parser.parse_args()

    session = elastic.join()
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, TOKENS, (args.samples, LENGTH + 1), generator=generator)
    waits = {"wait_s": args.wait_ms / 1000, "slow": args.slow}
    layers = layers_of(args.blocks, plain=args.plain, **waits, tied=not args.diloco)
    sync: Any = elastic.sync.AllReduce()
    if args.diloco:
        sync = elastic.sync.DiLoCo(args.diloco, 0.7, 0.3, nesterov=False, quantize=args.quantize)
    pipeline = session.pipeline(
        layers,
        loss_of,
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=args.batch_size, shuffle=True),
        scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step),
        slots=args.slots,
        virtual_replicas=args.virtual_replicas,
        stages=args.stages,
        schedule=args.schedule,
        clip_grad_norm=0.5,
        autocast=torch.bfloat16 if args.autocast else None,
        recompute=args.recompute,
        memory_bytes=args.memory,
        sync=sync,
        random_routing=args.random_routing,
    )
    steps = args.epochs * len(pipeline)

    def going() -> bool:
        return args.go is None or args.go.exists()

    def evaluate() -> None:
        if args.evaluate:
            losses.append(pipeline.eval((tokens[: args.batch_size, :-1], tokens[: args.batch_size, 1:])))

    def stray() -> None:
        if args.stray is not None:
            try:
                args.stray.unlink()
            except FileNotFoundError:
                return
            assert math.isnan(pipeline.eval((tokens[: args.batch_size, :-1], tokens[: args.batch_size, 1:])))

    def trace(step: int) -> None:
        (weight,) = layers[0].parameters()
        if args.trace is not None and not weight.is_meta:
            crc = zlib.crc32(weight.detach().numpy().tobytes())
            with (args.trace / str(os.getpid())).open("a") as file:
                file.write(f"{step} {session.generation} {crc} {0 in pipeline.layers}\n")

    losses: list[float] = []
    for _ in session.epochs(args.epochs):
        for batch in pipeline:
            while not going() and session.step >= steps - HELD_STEPS:
                session.heartbeat()
                time.sleep(0.02)
            if not going():
                time.sleep(args.pause_ms / 1000)
            loss = pipeline.step()
            assert batch.step == session.step, f"the batch is of step {batch.step}, and {session.step} was trained"
            trace(batch.step)
            stray()
            if batch.step % 10 == 0:
                evaluate()
        evaluate()
    state = pipeline.state_dict()
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr((loss, None if args.diloco else pipeline.grad_norm)).encode())  # a local step's norm is a worker's own
    if args.out is not None:
        args.out.mkdir(exist_ok=True)
        result = {"fingerprint": digest.hexdigest(), "loss": loss, "losses": losses, "layers": list(pipeline.layers)}
        partial = args.out / f"{os.getpid()}.partial"
        partial.write_text(json.dumps(result))
        partial.rename(args.out / f"{os.getpid()}.json")


if __name__ == "__main__":
    main()
