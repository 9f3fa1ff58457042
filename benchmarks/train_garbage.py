"""What `benchmarks.garbage` trains: a small network, with an index of many Python objects and cyclic garbage in every step."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elastic


def main() -> None:
    """Train, and write what each step took this worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--objects", type=int, required=True)
    parser.add_argument("--garbage", type=int, required=True)
    args = parser.parse_args()
    session = elastic.join()
    index = [{"id": number, "spans": [number, number + 1]} for number in range(args.objects // 2)]
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = TensorDataset(torch.randn(args.steps * 16, 64), torch.randint(0, 10, (args.steps * 16,)))
    model, optimizer, loader = session.prepare(model, optimizer, DataLoader(data, batch_size=4))
    times, began = [], time.perf_counter()
    for x, y in loader:
        for _ in range(args.garbage):
            ring: list[object] = [index[0]]
            ring.append(ring)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        now = time.perf_counter()
        times.append(now - began)
        began = now
        if session.step >= args.steps:
            session.stop()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{session.rank}.json").write_text(json.dumps({"steps_s": times, "resident_pages": pages}))


if __name__ == "__main__":
    main()
