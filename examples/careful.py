"""A careful training loop: mixed precision, evaluation, early stopping, an average of weights, one save at the end.

    elastic run --nproc-per-node 2 examples/careful.py --save digits.pt
    python examples/careful.py

The images and the network are those of `digits.py`. What each part needs of elastic stands beside it.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import elastic
from examples.digits import build_model, evaluate, load_digits


class EarlyStopping:
    """Knows when an accuracy has stopped growing; its state travels to workers that join."""

    def __init__(self, patience: int) -> None:
        self.patience, self.best, self.bad_epochs = patience, 0.0, 0

    def is_over(self, accuracy: float) -> bool:
        """Take an epoch's accuracy; returns whether it has not grown for too long."""
        self.bad_epochs = 0 if accuracy > self.best else self.bad_epochs + 1
        self.best = max(self.best, accuracy)
        return self.bad_epochs >= self.patience

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.bad_epochs = state["best"], int(state["bad_epochs"])


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights a little towards the model's, and take its statistics over."""
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
    for kept, new in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(new)


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description="Train a digit classifier with care.")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images, at most")
    parser.add_argument("--batch", type=int, default=16, help="images in one slot")
    parser.add_argument("--patience", type=int, default=2, help="epochs without a better accuracy before it stops")
    parser.add_argument("--decay", type=float, default=0.98, help="of the average of weights")
    parser.add_argument("--save", type=Path, help="file for the averaged weights")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    session = elastic.join()
    train_set, test_set = load_digits()
    loader = DataLoader(train_set, batch_size=arguments.batch, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=256)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    average, stopping = copy.deepcopy(model), EarlyStopping(arguments.patience)

    # Before prepare(): what else a worker that joins must be given.
    session.extra_state("average", average)
    session.extra_state("stopping", stopping)
    model, optimizer, scaler, loader = session.prepare(
        model, optimizer, scaler, loader, slots=4, virtual_replicas=4
    )

    def save() -> None:
        if arguments.save is not None:
            torch.save(average.state_dict(), arguments.save)
            print(f"saved after step {session.step}", flush=True)

    session.on_end(save)  # once, by one worker, after all have left the loop
    for epoch in session.epochs(arguments.epochs):
        for images, labels in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            session.log(loss=loss)
            session.mean("right", (logits.argmax(dim=1) == labels).float().mean())  # in place of an all-reduce
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # the next lines act on the whole step's gradient, once it is there
            session.clip_grad_norm_(1.0)
            scaler.step(optimizer)
            scaler.update()
            if session.committed:
                update_average(average, model, arguments.decay)
        # Every worker evaluates the same weights and comes to the same answer.
        accuracy = evaluate(average, test_loader)
        if session.is_main:
            print(
                f"epoch {epoch}: loss {session.loss:.4f}, trained on {100 * session.mean('right'):.1f} %, "
                f"accuracy {100 * accuracy:.1f} %",
                flush=True,
            )
        if stopping.is_over(accuracy):
            break  # all workers do, at the same step; a worker that decides alone calls session.stop()


if __name__ == "__main__":
    main()
