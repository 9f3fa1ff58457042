"""Classify handwritten digits with a small convolutional network; accuracy after each epoch.

    elastic run --nproc-per-node 2 examples/digits.py
    python examples/digits.py

What is elastic here: join(), prepare(), session.epochs() and session.clip_grad_norm_(). The dataset is
scikit-learn's (1797 images of 8 x 8 pixels), so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import elastic

TRAINED_SHARE = 0.8


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the images for training and for evaluation: float tensors [N, 1, 8, 8] in 0..1, and labels."""
    try:
        from sklearn import datasets
    except ImportError:
        sys.exit("this example needs scikit-learn for its images: pip install scikit-learn")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    split = int(TRAINED_SHARE * len(images))
    train, test = order[:split], order[split:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def build_model() -> nn.Module:
    """Return a network of two convolutions with batch norm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 4 * 4, 10),
    )


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Return the share of images that are classified correctly."""
    model.eval()
    right = total = 0
    for images, labels in loader:
        right += int((model(images).argmax(dim=1) == labels).sum())
        total += len(labels)
    model.train()
    return right / total


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description="Train a digit classifier.")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the images")
    parser.add_argument("--batch", type=int, default=16, help="images in one slot")
    parser.add_argument("--slots", type=int, default=4, help="slots in a global batch, whoever computes them")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    session = elastic.join()

    train_set, test_set = load_digits()
    loader = DataLoader(train_set, batch_size=arguments.batch, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=256)
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.epochs)

    # These two numbers fix how a global batch is summed, so that 2 workers and 3 get the same bits.
    model, optimizer, loader, scheduler = session.prepare(
        model, optimizer, loader, scheduler, slots=arguments.slots, virtual_replicas=arguments.slots
    )
    for epoch in session.epochs(arguments.epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            session.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            session.clip_grad_norm_(1.0)
            optimizer.step()
        scheduler.step()
        if session.is_main:
            accuracy = evaluate(model, test_loader)
            print(f"epoch {epoch}: loss {session.loss:.4f}, accuracy {100 * accuracy:.1f} %", flush=True)


if __name__ == "__main__":
    main()
