"""A script whose first rank gets stuck where a file tells it to, as scripts do: in two locks, in a sample, before a reduction."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import elastic

CASES = ("locks", "reader", "alone")


def folder() -> Path:
    """Where files tell what to do."""
    return Path(sys.argv[1])


def asked(case: str) -> bool:
    """Whether somebody is to be stuck like this; only the first who asks is."""
    try:
        (folder() / case).unlink()
    except FileNotFoundError:
        return False
    return True


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Random tensors; reading one may take for ever."""

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if asked("reader"):
            time.sleep(600)  # stuck: reader
        x = torch.randn(8)
        return x, (x.sum() > 0).long()


def deadlock() -> None:
    """Two threads that take two locks in different orders."""
    one, other = threading.Lock(), threading.Lock()
    both = threading.Barrier(2)

    def backwards() -> None:
        with other:
            both.wait()
            one.acquire()

    threading.Thread(target=backwards, name="backwards", daemon=True).start()
    with one:
        both.wait()
        other.acquire()  # stuck: locks


def main() -> None:
    """Train until told to go."""
    session = elastic.join()
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Samples(), batch_size=2, num_workers=1)
    model, optimizer, loader = session.prepare(model, optimizer, loader)
    for x, y in loader:
        time.sleep(0.02)
        if asked("locks"):
            deadlock()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if asked("alone"):
            time.sleep(600)  # stuck: alone
        optimizer.step()
        if (folder() / "go").exists():
            session.stop()


if __name__ == "__main__":
    main()
