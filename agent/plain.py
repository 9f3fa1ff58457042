"""A snapshot as the state dict that plain PyTorch loads: which tensor of the manifest stands under which key.

    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "elastic": {...}}

with several models or optimizers "model0", "optimizer1" and so on, and a name that the script has chosen for an extra
module. Everything that only elastic needs stands under "elastic", in tensors of bytes. Tensors have no memory here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from elastic.encoding import TENSOR_DTYPES, decode
from elastic.errors import CheckpointError
from elastic.state import Entry

OWN = "elastic"
DESCRIPTION = f"{OWN}.description"
"""The key of the description, as torch.distributed.checkpoint flattens keys."""


@dataclass(slots=True)
class PlainForm:
    """A state dict without memory, and where its tensors come from.

    Attributes:
        state_dict: nested; its tensors are on the meta device.
        entries: flattened key -> index in the manifest; a tied tensor stands under several keys.
    """

    state_dict: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)

    def keys(self) -> dict[int, str]:
        """Index in the manifest -> a key under which the tensor stands."""
        return {index: key for key, index in self.entries.items()}

    def place(self, path: tuple[str | int, ...], index: int, entry: Entry) -> None:
        """Let a tensor of the manifest stand at a path."""
        key = ".".join(map(str, path))
        if key in self.entries:
            raise CheckpointError(
                f"Two tensors of a checkpoint would be called {key!r}: rename a model or an extra state."
            )
        self.entries[key] = index
        folder: dict[Any, Any] = self.state_dict
        for part in path[:-1]:
            folder = folder.setdefault(part, {})
        folder[path[-1]] = torch.empty(entry.shape, dtype=TENSOR_DTYPES[entry.dtype], device="meta")


def plain_form(manifest: Sequence[Entry], small: str, description_bytes: int) -> PlainForm:
    """Arrange a snapshot as plain PyTorch wants it.

    Args:
        manifest, small: as `TrainingState` gives them. description_bytes: length of both as they are stored.

    Raises:
        CheckpointError: two things have the same name.
    """
    values = _decoded(small)
    models, optimizers = values["models"], values["optimizers"]
    names = [*models, *optimizers, OWN]
    if len(set(names)) < len(names):
        raise CheckpointError(f"Of {', '.join(names)} two have the same name in a checkpoint: rename an extra state.")
    form = PlainForm()
    form.state_dict = {
        **{name: {} for name in models},
        **{name: _optimizer(each) for name, each in optimizers.items()},
        OWN: {"description": torch.empty(description_bytes, dtype=torch.uint8, device="meta")},
    }
    # Where a model is called "a" and another "a.b", the longer name is meant.
    by_length = sorted(models, key=len, reverse=True)
    unsaved = {name for model in models.values() for name in model["unsaved"]}
    indices: dict[str, int] = {}
    for index, entry in enumerate(manifest):
        path: tuple[str | int, ...]
        if entry.address is not None:
            group, position, key = entry.address
            path = (entry.name, "state", _first_of_group(optimizers[entry.name]["sizes"])[group] + position, key)
        else:
            indices[entry.name] = index
            model = next(name for name in by_length if entry.name.startswith(f"{name}."))
            path = (OWN, "unsaved", entry.name) if entry.name in unsaved else (model, entry.name[len(model) + 1 :])
        form.place(path, index, entry)
    for model, saved in models.items():
        for key, name in saved["also"].items():
            form.place((model, key), indices[name], manifest[indices[name]])
    return form


def _decoded(small: str) -> dict[str, Any]:
    """The small state but for schedulers and the like, which only their owners in a training process can decode."""
    wanted = [pair for pair in json.loads(small)["dict"] if pair[0] in ("models", "optimizers")]
    values: dict[str, Any] = decode(json.dumps({"dict": wanted}), what="the training state")
    return values


def _optimizer(small: dict[str, Any]) -> dict[str, Any]:
    """What `Optimizer.state_dict()` holds besides the manifest's tensors."""
    firsts, sizes = _first_of_group(small["sizes"]), small["sizes"]
    state: dict[Any, Any] = {}
    for (group, position, key), value in small["state"].items():
        state.setdefault(firsts[group] + position, {})[key] = value
    return {
        "state": state | small["shared"],
        "param_groups": [
            {**group, "params": list(range(first, first + size))}
            for group, first, size in zip(small["groups"], firsts, sizes, strict=True)
        ],
    }


def _first_of_group(sizes: Sequence[int]) -> list[int]:
    """The number that each group's first parameter has in a state dict."""
    return list(accumulate(sizes, initial=0))[:-1]
