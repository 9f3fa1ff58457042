"""The prepared loader: yields this worker's slots of each step, and nothing else decides what comes next.

It takes an ordinary map-style DataLoader apart (dataset, batch size, collation, pinning): one batch of it is one slot.
Which samples a slot holds is the sampler's word, which slot comes next the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from elastic.engine import Engine
from elastic.errors import ConfigError
from elastic.seeding import seed_everything


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """What a DataLoader says about sampling.

    Raises (from `of`):
        ConfigError: the loader samples in a way that cannot be dealt to changing workers.
    """

    dataset_size: int
    batch_size: int
    shuffle: bool
    drop_last: bool

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> LoaderSpec:
        """Read a loader's settings."""
        if isinstance(loader.dataset, IterableDataset):
            raise ConfigError(
                "the loader's dataset is an IterableDataset, whose samples have no numbers that could be dealt to other "
                "workers: wrap it in a map-style dataset (with __len__ and __getitem__)"
            )
        if loader.batch_size is None:
            raise ConfigError(
                "the loader has a batch sampler of its own (or batch_size=None): give DataLoader a plain batch_size; it "
                "is the size of one slot"
            )
        if isinstance(loader.sampler, RandomSampler):
            if loader.sampler.replacement or loader.sampler._num_samples is not None:
                raise ConfigError("the loader's RandomSampler draws with replacement or a subset: use shuffle=True")
            shuffle = True
        elif isinstance(loader.sampler, SequentialSampler):
            shuffle = False
        else:
            raise ConfigError(
                f"the loader has a sampler of its own ({type(loader.sampler).__name__}): drop it; which worker reads which "
                "sample is decided by elastic, and shuffling is by shuffle=True and the seed"
            )
        if type(loader).__iter__ is not DataLoader.__iter__:
            raise ConfigError(f"the loader is a {type(loader).__name__} with an __iter__ of its own: pass a DataLoader")
        if loader.num_workers > 0:
            raise ConfigError(
                f"the loader has num_workers={loader.num_workers}: this version fetches in the training process; "
                "use num_workers=0"
            )
        return cls(len(loader.dataset), loader.batch_size, shuffle, loader.drop_last)  # type: ignore[arg-type]


class ElasticLoader:
    """Iterates over this worker's slots of one data epoch; `len` is the number of steps in it."""

    def __init__(self, loader: DataLoader[Any], engine: Engine, seed: int) -> None:
        self.dataset = loader.dataset
        self.batch_size = loader.batch_size
        self._loader = loader
        self._engine = engine
        self._seed = seed
        self.left_early = False

    def __len__(self) -> int:
        return self._engine.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        self._engine.begin_epoch()
        self.left_early = True
        while True:
            slot = self._engine.next_slot()
            if slot is None:
                self.left_early = False
                return
            seed_everything(self._seed, slot.step, slot.slot, "fetch")
            batch = self._fetch(slot.ids)
            seed_everything(self._seed, slot.step, slot.slot, "slot")
            yield batch

    def _fetch(self, ids: Sequence[int]) -> Any:
        dataset: Any = self.dataset
        if hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(list(ids))
        else:
            samples = [dataset[index] for index in ids]
        batch = self._loader.collate_fn(samples)
        if self._loader.pin_memory and torch.cuda.is_available():
            return torch.utils.data._utils.pin_memory.pin_memory(batch)  # type: ignore[no-untyped-call]
        return batch
