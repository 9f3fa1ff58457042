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
from torch.utils.checkpoint import checkpoint
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


class Odd(nn.Module):
    """A network with everything that a reducer may stumble over: a frozen layer, a parameter that is never used, one that
    only some samples use, two layers that share their weights, and a buffer of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.sometimes = nn.Linear(FEATURES, FEATURES)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        x = self.frozen(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return self.sometimes(x) if x[0, 0] > 0 else x


class Average:
    """A running average of weights, as an object of the user's own with a state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}

    def update(self) -> None:
        for name, tensor in self.model.named_parameters():
            self.values[name].lerp_(tensor.detach(), 0.1)

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.values = {name: tensor.clone() for name, tensor in state.items()}


FEATURES_OF_LOOPS = ("amp", "readers", "compile", "checkpoint", "odd", "weights", "average", "evaluate")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1217)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--slots", type=int, default=6)
    parser.add_argument("--virtual-replicas", type=int, default=4)
    parser.add_argument("--reduction", default="ordered")
    parser.add_argument("--optimizer", choices=("adamw", "sgd", "plain"), default="adamw")
    parser.add_argument("--shard-optimizer", action="store_true")
    parser.add_argument("--overlap", type=int, default=0, help="Local steps while a fragment is exchanged.")
    parser.add_argument("--diloco", type=int, default=0, metavar="H", help="Agree after H local steps.")
    parser.add_argument("--fragments", type=int, default=0, metavar="P", help="... on one of P fragments after H / P.")
    parser.add_argument("--quantize", choices=("int8", "fp4"))
    parser.add_argument("--model-only", action="store_true", help="Leave the optimizer out of the fingerprint.")
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
    parser.add_argument("--with", dest="features", nargs="*", default=[], choices=FEATURES_OF_LOOPS)
    parser.add_argument("--hang", default="", help="STEP:RANK at which to loop for ever, once (--failed remembers that).")
    parser.add_argument("--leave", default="", help="STEP:RANK after which to leave the loop alone.")
    parser.add_argument("--long", nargs="*", default=[], help="STEP:HOW at which the first rank does nothing else for 3 s.")
    parser.add_argument("--differ", default="", help="What the odd local ranks do otherwise.")
    parser.add_argument("--stop-at", type=int, default=0, help="Step in which worker 0 asks all to stop.")
    parser.add_argument("--save", type=Path, help="File that on_end writes ...")
    parser.add_argument("--hold-save", type=Path, help="... once this one exists.")
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


def left(place: str) -> tuple[int, int]:
    """Read STEP:RANK."""
    step, _, rank = place.partition(":")
    return int(step), int(rank)


def comes(place: str, session: elastic.Session) -> bool:
    """Whether STEP:RANK is what this worker computes now."""
    return left(place) == (session.step + 1, session.rank)


def once(file: Path) -> bool:
    """Whether nobody has been here before."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def linger(places: list[str], session: elastic.Session, model: nn.Module) -> None:
    """Do something for three seconds that is no hang."""
    for place in places:
        step, _, how = place.partition(":")
        if session.step + 1 != int(step):
            continue
        if how == "busy":
            session.busy(10)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            if how == "evaluate":
                evaluate(model)
            elif how == "heartbeat":
                session.heartbeat()
            time.sleep(0.1)
        session.busy(0)


def evaluate(model: nn.Module) -> None:
    """Look at the model in the middle of training, which must change nothing."""
    model.eval()
    with torch.no_grad():
        model(torch.randn(8, FEATURES))
    model.train()


def save(args: argparse.Namespace, session: elastic.Session, model: nn.Module) -> None:
    """Write what was trained, once."""
    (args.save.parent / f"saving-{os.getpid()}").touch()
    while args.hold_save is not None and not args.hold_save.exists():
        time.sleep(0.02)
    partial = args.save.with_suffix(f".{os.getpid()}")
    torch.save({"step": session.step, "model": model.state_dict()}, partial)
    partial.replace(args.save)


def sync_of(args: argparse.Namespace) -> Any:
    """How replicas agree."""
    if args.fragments:
        mixing = 0.5 if args.overlap else 0.0
        return elastic.sync.StreamingDiLoCo(args.diloco, args.fragments, args.overlap, mixing, quantize=args.quantize)
    return elastic.sync.DiLoCo(args.diloco, quantize=args.quantize) if args.diloco else elastic.sync.AllReduce()


def main() -> None:
    """Train as the command line says."""
    args = arguments()
    session = elastic.join()
    if args.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"])
    if args.differ == "threads" and session.local_rank % 2:
        torch.set_num_threads(2)
    if args.uneven:
        torch.manual_seed(os.getpid())
    model: Any = Network(dropout=0.0 if args.plain_model else 0.2, norm=not args.plain_model)
    optimizer: Any
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    elif args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    features = set(args.features)
    odd = Odd()
    odd_optimizer = torch.optim.SGD([p for p in odd.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7, enabled="amp" in features)
    average = Average(model)
    if "average" in features:
        session.extra_state("average", average)
    if "odd" in features:
        session.buffer_rule("*.seen", "delta")
    if args.save is not None:
        session.on_end(lambda: save(args, session, model))
    samples = Samples(args.samples, args.rotten)
    if args.differ == "data" and session.local_rank % 2:
        samples.x[0] += 1
    loader: Any = DataLoader(
        samples,
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=2 if "readers" in features else 0,
    )
    (loader,) = session.prepare(
        model,
        optimizer,
        scheduler,
        scaler,
        *((odd, odd_optimizer) if "odd" in features else ()),
        loader,
        slots=args.slots,
        virtual_replicas=args.virtual_replicas,
        reduction=args.reduction,
        shard_optimizer=args.shard_optimizer,
        sync=sync_of(args),
    )[-1:]
    network = torch.compile(model) if "compile" in features else model
    steps = args.epochs * len(loader)

    def going() -> bool:
        return args.go is None or args.go.exists()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        if "odd" in features:
            x = odd(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="amp" in features):
            if "checkpoint" in features:
                out = checkpoint(network, x, use_reentrant=False)
            else:
                out = network(x)
        return F.cross_entropy(out.float(), y)

    for _ in session.epochs(args.epochs):
        for x, y in loader:
            if session.local_rank == args.fail_worker and session.step >= 5:
                raise RuntimeError(f"this worker cannot train ({time.monotonic_ns()})")
            if args.fail and comes(args.fail, session) and once(args.failed):
                raise RuntimeError("a fault of user code")
            while not going() and session.step >= steps - HELD_STEPS:
                session.heartbeat()
                time.sleep(0.02)
            if not going():
                time.sleep(args.pause_ms / 1000)
            if args.hang and comes(args.hang, session) and once(args.failed):
                while True:
                    pass
            if args.long and session.rank == 0:
                linger(args.long, session, model)
            if args.differ == "lr" and session.step == 9 and session.local_rank % 2:
                optimizer.param_groups[0]["lr"] *= 2
            if args.differ == "dist" and session.step == 5:
                torch.distributed.all_reduce(torch.ones(1))
            if args.differ == "mean" and session.step == 9 and session.local_rank % 2:
                session.mean("only here", 1.0)
            optimizer.zero_grad()
            loss = loss_of(x, y)
            session.log(loss=loss)
            session.mean("zeros", (y == 0).float().mean())
            if "weights" in features:
                session.weight(1 + int((y != 0).sum()))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if args.clip:
                session.clip_grad_norm_(args.clip)
            scaler.step(optimizer)
            if "odd" in features:
                scaler.step(odd_optimizer)
            scaler.update()
            if not args.no_scheduler and not args.per_epoch:
                scheduler.step()
            if session.committed:
                average.update()
                if "evaluate" in features and session.step % 20 == 0:
                    evaluate(model)
            if args.leave and session.committed and left(args.leave) == (session.step, session.rank):
                break
            if args.stop_at and session.is_main and session.step >= args.stop_at:
                session.stop()
        if args.per_epoch:
            scheduler.step()
    session.close()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        things = [model, scheduler, scaler, odd]
        things += [average] if "average" in features else []
        things += [] if args.model_only else [optimizer]
        ended = {
            "step": session.step,
            "fingerprint": fingerprint(*things),
            "loss": session.loss,
            "zeros": session.mean("zeros"),
        }
        partial = args.out / f"{os.getpid()}.part"
        partial.write_text(json.dumps(ended))
        partial.replace(partial.with_suffix(".json"))


if __name__ == "__main__":
    main()
