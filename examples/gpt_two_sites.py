"""Train the byte-level GPT of `gpt.py` on two sites with a slow link between them: each by itself, and now and then they agree.

    elastic controller --nnodes 1:2                                                          (at one of them)
    elastic agent --controller HOST:29400 examples/gpt_two_sites.py --quantize int8           (at each)

`elastic run --nproc-per-node 2 examples/gpt_two_sites.py` is the same on one machine. With --fragments 4 a quarter of the model
is agreed on at a time. A site that is lost is done without, and is given what was agreed on when it is back.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import elastic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, and `examples` is above
from examples.gpt import GPT, Windows, learning_rate


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description="Train a small GPT on two sites.")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=64, help="bytes in a window")
    parser.add_argument("--batch", type=int, default=8, help="windows in a local step of one replica")
    parser.add_argument("--replicas", type=int, default=2, help="that train by themselves, whoever computes them")
    parser.add_argument("--every", type=int, default=50, help="local steps from one agreement to the next")
    parser.add_argument("--fragments", type=int, default=1, help="parts of the model that are agreed on in turns")
    parser.add_argument("--quantize", choices=["int8", "fp4"], help="send what has moved in few bits")
    parser.add_argument("--rounds", type=int, default=20, help="agreements")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.fragments > 1:
        sync: elastic.sync.Sync = elastic.sync.StreamingDiLoCo(
            arguments.every, arguments.fragments, quantize=arguments.quantize
        )
    else:
        sync = elastic.sync.DiLoCo(arguments.every, quantize=arguments.quantize)
    local_steps = arguments.rounds * arguments.every // arguments.fragments
    session = elastic.join()

    model = GPT(arguments.dim, arguments.layers, arguments.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step, local_steps))
    loader = DataLoader(Windows(arguments.context), batch_size=arguments.batch, shuffle=True)
    model, optimizer, scheduler, loader = session.prepare(
        model, optimizer, scheduler, loader, slots=arguments.replicas, virtual_replicas=arguments.replicas, sync=sync
    )

    def report(step: int) -> None:
        print(f"agreement {step}: loss {session.loss:.4f}, {session.world_size} site(s)", flush=True)

    session.on_commit(report)
    for _ in session.epochs(arguments.rounds):
        for inputs, targets in loader:  # a local step of one replica
            loss = model(inputs, targets)
            session.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            session.clip_grad_norm_(1.0)
            optimizer.step()
            scheduler.step()
            if session.committed and session.step >= arguments.rounds:
                break


if __name__ == "__main__":
    main()
