"""Train a byte-level GPT on the sources of Python's own standard library: nothing to download.

Run it by `elastic run --nproc-per-node 4 examples/gpt.py --slots 12`, or by `python examples/gpt.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

import elastic

VOCABULARY = 256  # bytes
HEADS = 4
TEXT_SIZE_BYTES_MAX = 4 * 1024 * 1024


class Block(nn.Module):
    """One transformer layer: causal attention, then a perceptron, each behind a layer norm."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_perceptron = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.drop.p if self.training else 0.0
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.drop(self.out(attention.transpose(1, 2).reshape(batch, length, dim)))
        x = x + self.drop(self.down(F.gelu(self.up(self.norm_perceptron(x)))))
        return x


class GPT(nn.Module):
    """A decoder over bytes, its output layer tied to the embedding; a call returns the mean loss."""

    def __init__(self, dim: int = 256, layers: int = 6, context: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, dim), nn.Embedding(context, dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, HEADS, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """The text cut into windows of `context` bytes, each with the same bytes one place further as targets."""

    def __init__(self, context: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:TEXT_SIZE_BYTES_MAX]
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index * self.context : (index + 1) * self.context + 1].long()
        return window[:-1], window[1:]


def learning_rate(step: int, steps: int) -> float:
    """Return the factor of a linear warm-up followed by a cosine down to a tenth."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up)))


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description="Train a small GPT.")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=64, help="bytes in a window")
    parser.add_argument("--steps", type=int, default=200, help="steps to train")
    parser.add_argument("--batch", type=int, default=4, help="windows in one slot")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--slots", type=int, default=0, help="slots in a step [workers at the start]")
    parser.add_argument("--virtual-replicas", type=int, default=0, help="blocks of slots [likewise]")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=None, help="seed of everything random [the job's]")
    parser.add_argument("--timeline", type=Path, help="file for a JSON line per step")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    session = elastic.join()

    model = GPT(arguments.dim, arguments.layers, arguments.context, arguments.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step, arguments.steps))
    loader = DataLoader(Windows(arguments.context), batch_size=arguments.batch, shuffle=True)
    model, optimizer, scheduler, loader = session.prepare(
        model, optimizer, scheduler, loader,
        slots=arguments.slots, virtual_replicas=arguments.virtual_replicas, seed=arguments.seed,
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
    for _ in session.epochs(arguments.steps):  # an epoch has at least one step, so these are enough
        for inputs, targets in loader:
            loss = model(inputs, targets)
            session.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            session.clip_grad_norm_(1.0)
            optimizer.step()
            scheduler.step()
            if session.step >= arguments.steps:
                break


if __name__ == "__main__":
    main()
