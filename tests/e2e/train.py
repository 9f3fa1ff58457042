"""What the end-to-end jobs train: a small network on random tensors, with every part that has state of its own.

A program by itself, as a user would write it, plus a few switches that make it fail. While the file of --go is missing
it is slow, and it never ends: a test can do to the job what it wants and then let it go.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import elastic

FEATURES, HIDDEN, CLASSES = 16, 32, 4
HELD_STEPS = 8  # so many steps before the end it waits for --go


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Random tensors; one of them may be rotten."""

    def __init__(self, size: int, rotten: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, FEATURES, generator=generator)
        self.y = torch.randint(0, CLASSES, (size,), generator=generator)
        self.rotten = rotten

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.rotten:
            raise ValueError("this sample is rotten")
        return self.x[index], self.y[index]


class Network(nn.Module):
    """A perceptron with dropout and batch norm, or without."""

    def __init__(self, *, dropout: float, norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN),
            nn.BatchNorm1d(HIDDEN) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1217)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--slots", type=int, default=6)
    parser.add_argument("--virtual-replicas", type=int, default=4)
    parser.add_argument("--reduction", default="ordered")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--plain-model", action="store_true", help="Neither dropout nor batch norm.")
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--no-scheduler", action="store_true")
    parser.add_argument("--per-epoch", action="store_true", help="Step the scheduler after each epoch, not each step.")
    parser.add_argument("--pause-ms", type=float, default=60.0, help="Sleep per slot until --go exists.")
    parser.add_argument("--go", type=Path)
    parser.add_argument("--out", type=Path, help="Directory for what each process ended with.")
    parser.add_argument("--fail", default="", help="STEP:RANK at which to raise once (--failed remembers that).")
    parser.add_argument("--failed", type=Path)
    parser.add_argument("--fail-worker", type=int, default=-1, help="Local rank that raises before it trains, always.")
    parser.add_argument("--stubborn", action="store_true", help="Ignore SIGTERM, and start a process that does too.")
    parser.add_argument("--uneven", action="store_true", help="Begin with other weights on every worker.")
    parser.add_argument("--rotten", type=int, default=-1, help="Id of a sample that cannot be read.")
    return parser.parse_args()


def fingerprint(*things: Any) -> str:
    """Digest of all tensors and numbers in state dicts, by this file's own means."""
    digest = hashlib.sha256()
    for thing in things:
        for value in flat(thing.state_dict()):
            digest.update(value)
    return digest.hexdigest()


def flat(value: Any) -> Iterator[bytes]:
    """Yield every leaf of nested containers as bytes, in order."""
    if isinstance(value, dict):
        for key in sorted(value, key=repr):  # a worker that joined holds its keys in another order
            yield repr(key).encode()
            yield from flat(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flat(item)
    elif isinstance(value, Tensor):
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield repr(value).encode()


def main() -> None:
    """Train as the command line says."""
    args = arguments()
    session = elastic.join()
    if args.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"])
    if args.uneven:
        torch.manual_seed(os.getpid())
    model: Any = Network(dropout=0.0 if args.plain_model else 0.2, norm=not args.plain_model)
    optimizer: Any
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    loader: Any = DataLoader(Samples(args.samples, args.rotten), batch_size=args.batch_size, shuffle=True)
    model, optimizer, loader, scheduler = session.prepare(
        model,
        optimizer,
        loader,
        scheduler,
        slots=args.slots,
        virtual_replicas=args.virtual_replicas,
        reduction=args.reduction,
    )
    steps = args.epochs * len(loader)
    fail_step, _, fail_rank = args.fail.partition(":")

    def going() -> bool:
        return args.go is None or args.go.exists()

    for _ in session.epochs(args.epochs):
        for x, y in loader:
            if session.local_rank == args.fail_worker and session.step >= 5:
                raise RuntimeError(f"this worker cannot train ({time.monotonic_ns()})")
            if fail_step and (session.step + 1, session.rank) == (int(fail_step), int(fail_rank)):
                try:
                    args.failed.touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    raise RuntimeError("a fault of user code")
            while not going() and session.step >= steps - HELD_STEPS:
                time.sleep(0.02)
            if not going():
                time.sleep(args.pause_ms / 1000)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            session.log(loss=loss)
            loss.backward()
            if args.clip:
                session.clip_grad_norm_(args.clip)
            optimizer.step()
            if not args.no_scheduler and not args.per_epoch:
                scheduler.step()
        if args.per_epoch:
            scheduler.step()
    session.close()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        ended = {
            "step": session.step,
            "fingerprint": fingerprint(model, optimizer, scheduler),
            "loss": session.loss,
        }
        partial = args.out / f"{os.getpid()}.part"
        partial.write_text(json.dumps(ended))
        partial.replace(partial.with_suffix(".json"))


if __name__ == "__main__":
    main()
