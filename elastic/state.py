"""The training state of one replica: what a joiner must receive to train on with the same bits.

Reads models, optimizers, schedulers and the like through their public attributes, addresses an optimizer's state by
(optimizer, group, position in the group), and splits everything into large tensors (the manifest) and small
values (JSON text). Reading must never change what is read: no hidden optimizer step, no state that springs
into being, no alias of a live tensor in the small part. No rank, no memory address and no order of insertion
may reach the output, since several donors describe the same state and must agree byte for byte.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic.encoding import TENSOR_DTYPES, check_dense, decode, encode, flat_bytes, raw_view
from elastic.errors import ConfigError, TransferError
from elastic.sharding import Cut, OptimizerShards, Sharding, owned

DIGEST_SIZE_BYTES = 16
DIMENSIONS_MAX = 64

StateAddress = tuple[int, int, str]
"""Where a value of an optimizer's state is: index of the group, index of the parameter in it, key."""


class EntryKind(enum.StrEnum):
    """What a tensor of the state belongs to."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the training state, described.

    Attributes:
        kind: what it belongs to. name: "<model>.<name in the model>" of a parameter or buffer; the
            optimizer's name otherwise. dtype: torch's name of the dtype, such as "bfloat16". shape: sides.
            device: type of the device, such as "cpu" or "cuda". address: where in the optimizer; None for
            parameters and buffers. stride: of an optimizer's tensor that is dense but not row-major, None
            otherwise. Kept because the order in
            which a kernel sums (a norm, a matrix product) follows the memory, and so do the last bits.
            sharding: how it is shared out among the workers; None if each has all of it.
    """

    kind: EntryKind
    name: str
    dtype: str
    shape: tuple[int, ...]
    device: str
    address: StateAddress | None = None
    stride: tuple[int, ...] | None = None
    sharding: Sharding | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * TENSOR_DTYPES[self.dtype].itemsize

    def extent(self, cut: Cut) -> range:
        """The bytes of the tensor, in row-major order, that a worker with this part of the job holds."""
        group, index, _ = self.address or (0, 0, "")
        elements = owned(self.sharding, math.prod(self.shape), group + index, cut)
        width = TENSOR_DTYPES[self.dtype].itemsize
        return range(elements.start * width, elements.stop * width)

    @property
    def label(self) -> str:
        """The entry in words, for errors."""
        if self.address is None:
            return f"{self.kind} {self.name!r}"
        group, index, key = self.address
        return f"state {key!r} of parameter {index} in group {group} of optimizer {self.name!r}"

    @property
    def description(self) -> str:
        """What must be equal on both sides, in words."""
        return f"{self.dtype} of shape {self.shape} on {self.device}"

    def to_json(self) -> list[Any]:
        """As a list of JSON's own types."""
        return [self.kind.value, self.name, self.dtype, self.shape, self.device, self.address, self.stride, self.sharding]

    @classmethod
    def from_json(cls, fields: object) -> Entry:
        """The inverse of `to_json`.

        Raises:
            TransferError: `fields` is not what `to_json` can return.
        """
        try:
            kind, name, dtype, shape, device, address, stride, sharding = _checked(fields, list)
            entry = cls(
                kind=EntryKind(kind),
                name=_checked(name, str),
                dtype=_checked(dtype, str),
                shape=_sides(shape),
                device=_checked(device, str),
                address=None if address is None else _address(address),
                stride=None if stride is None else _sides(stride),
                sharding=None if sharding is None else Sharding(sharding),
            )
        except (ValueError, TypeError) as error:
            raise TransferError(
                f"A manifest holds a malformed entry ({error}): ask for the state again."
            ) from error
        is_state = entry.kind is EntryKind.OPTIMIZER
        is_sound = entry.dtype in TENSOR_DTYPES and is_state == (entry.address is not None)
        is_sound &= is_state or entry.sharding is None
        if not is_sound or (entry.stride is not None and not _fills_memory(entry.shape, entry.stride)):
            raise TransferError(f"A manifest holds an impossible entry ({fields}): ask for the state again.")
        return entry


class TrainingState:
    """Models, optimizers and what else has a state of one replica, readable as bytes and writable from bytes.

    Args:
        models: by name; none for the state of the optimizers alone. What several models share counts once.
        optimizers: by name; each may hold only parameters of the models.
        stateful: by name; anything with `state_dict()` and `load_state_dict()`: schedulers, scalers, the user's own.
        buffers: tensors to read and write in place of the modules' buffers of the same full name
            ("<model>.<name>"), such as the committed copy. Looked up anew each time; buffers that it lacks are the
            modules' own.
        shards: which part of the optimizers' state is here; None for all of it.

    Raises:
        ConfigError: an optimizer or a thing of a kind that cannot be moved.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        stateful: Mapping[str, Any],
        buffers: Mapping[str, Tensor] | None = None,
        shards: OptimizerShards | None = None,
    ) -> None:
        self.models = models
        self.optimizers = optimizers
        self.stateful = stateful
        self.buffers: Mapping[str, Tensor] = {} if buffers is None else buffers
        self.shards = shards
        for name, optimizer in optimizers.items():
            if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
                raise ConfigError(
                    f"Optimizer {name!r} is {type(optimizer).__name__}, whose state cannot be moved between "
                    "workers: use another optimizer."
                )
        for name, thing in stateful.items():
            if not hasattr(thing, "state_dict") or not hasattr(thing, "load_state_dict"):
                raise ConfigError(
                    f"{name!r} ({type(thing).__qualname__}) has no state_dict() and "
                    "load_state_dict(): add them, so that a worker that joins can take over its state."
                )

    def digest_model(self) -> str:
        """Hex digest of all parameters and buffers, compared by bits: the digest of a run.

        The first half of the SHA-256 (for which processors have instructions) over the tensors in the order of
        their names, each framed by name, dtype and shape. Memory formats and devices do not matter.
        """
        digest = hashlib.sha256()
        for entry, tensor in sorted(self._model_items(), key=lambda item: item[0].name):
            frame = json.dumps([entry.name, entry.dtype, entry.shape]).encode()
            digest.update(len(frame).to_bytes(8, "little") + frame)
            data = flat_bytes(tensor).cpu()
            digest.update(raw_view(data))
        return digest.hexdigest()[: 2 * DIGEST_SIZE_BYTES]

    def digest_layout(self) -> str:
        """Hex digest of names, dtypes and shapes of all parameters and buffers: what can be trained together."""
        digest = hashlib.sha256()
        for entry, _ in sorted(self._model_items(), key=lambda item: item[0].name):
            digest.update(json.dumps([entry.name, entry.dtype, entry.shape]).encode())
        return digest.hexdigest()[: 2 * DIGEST_SIZE_BYTES]

    def manifest(self) -> list[Entry]:
        """Every tensor of the state in a fixed order: parameters, buffers, then the optimizers' state."""
        return [entry for entry, _ in self._items()]

    def tensors(self) -> list[Tensor]:
        """The live tensors that `manifest()` describes, in its order, detached; of one that is cut the part that is here."""
        return [tensor for _, tensor in self._items()]

    def described_tensors(self) -> tuple[list[Entry], list[Tensor]]:
        """`manifest()` and `tensors()` from one pass."""
        items = list(self._items())
        return [entry for entry, _ in items], [tensor for _, tensor in items]

    @property
    def cut(self) -> Cut:
        """Which part of what is cut is here."""
        return Cut() if self.shards is None else self.shards.cut

    def extents(self, manifest: Sequence[Entry]) -> list[range]:
        """For each tensor of a manifest, in row-major order, the bytes that the tensor here has of it."""
        return [self._extent(entry) for entry in manifest]

    def small(self) -> str:
        """Everything but the manifest's tensors, as JSON text: hyper-parameters, counters, schedulers and the like.

        Raises:
            ConfigError: a value cannot be sent; names its path.
        """
        return encode(self._small_values(), "the training state")

    def adopt(self, manifest: Sequence[Entry], small: str) -> list[Tensor]:
        """Take over a donor's small state, and make room for its tensors.

        Everything is checked before anything is changed. Afterwards the optimizers hold exactly the donor's
        keys, with the contents of the returned tensors still to be written; until then this replica must not
        train.

        Args:
            manifest: the donor's `manifest()`.
            small: the donor's `small()`.

        Returns:
            The tensors to write, in the manifest's order; see `extents` for what of each.

        Raises:
            ConfigError: models, optimizers or the others differ from the donor's; names the first difference.
            TransferError: `small` or the manifest contradicts itself.
        """
        model_items = list(self._model_items())
        described = [entry for entry in manifest if entry.address is None]
        _check_same_model([entry for entry, _ in model_items], described)
        if described != list(manifest[: len(described)]):
            raise TransferError("A manifest mixes model and optimizer tensors: ask for the state again.")
        for entry, tensor in model_items:
            if any(side > 1 and step == 0 for side, step in zip(tensor.shape, tensor.stride(), strict=True)):
                raise ConfigError(
                    f"The {entry.label} is an expanded tensor, whose elements share memory: clone() it first."
                )
        values = decode(small, self._small_values(), "the training state")
        self._check_same_structure(values)
        entries = manifest[len(described) :]
        state_tensors = [self._state_tensor_for(entry) for entry in entries]
        for name, thing in self.stateful.items():
            thing.load_state_dict(values["stateful"][name])
        # After the schedulers, as torch advises: some of them write learning rates when loaded.
        for name, optimizer in self.optimizers.items():
            _load_groups(optimizer, values["optimizers"][name]["groups"])
            at_optimizer = {
                entry.address: tensor
                for entry, tensor in zip(entries, state_tensors, strict=True)
                if entry.name == name and entry.address is not None
            }
            _load_state(optimizer, at_optimizer, values["optimizers"][name], self._key)
        if self.shards is not None:
            self.shards.touched()
        return [tensor for _, tensor in model_items] + state_tensors

    def chosen(self, sections: Sequence[tuple[Sequence[Entry], str]]) -> tuple[list[Entry], str]:
        """Return, of a state that was described in sections, the manifest and the small state of what is here.

        Raises:
            ConfigError: something that is here is in no section. TransferError: a section contradicts itself.
        """
        described: dict[str, Entry] = {}
        states: list[Entry] = []
        wanted = {"models": self.models, "optimizers": self.optimizers, "stateful": self.stateful}
        merged: dict[str, dict[str, Any]] = {kind: {} for kind in wanted}
        for entries, small in sections:
            described |= {entry.name: entry for entry in entries if entry.address is None}
            states += [entry for entry in entries if entry.address is not None and entry.name in self.optimizers]
            for kind, pairs in _kinds_of_small(small).items():
                merged[kind] |= {name: value for name, value in pairs if name in wanted[kind]}
        missing = [entry.label for entry, _ in self._model_items() if entry.name not in described]
        if missing:
            raise ConfigError(f"The snapshot does not have the {missing[0]}: {_SAME_PROGRAM}")
        chosen = [described[entry.name] for entry, _ in self._model_items()]
        return chosen + sorted(states, key=lambda entry: entry.name), _small_of_kinds(merged)

    def recut(self, cut: Cut) -> tuple[list[Entry], list[Tensor], list[Tensor]]:
        """Make room for another part of what is cut.

        Returns:
            The manifest; the tensors of the old part, which are this state's no more; those of the new part, still to be
            written. What is not cut is the same tensor in both.
        """
        assert self.shards is not None
        manifest, old = self.described_tensors()
        held = {
            id(parameter): dict(optimizer.state.get(self._key(parameter), {}))
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.shards.recut(cut)
        new = []
        for entry, tensor in zip(manifest, old, strict=True):
            if entry.sharding is not None and entry.address is not None:
                tensor = self._state_tensor_for(entry)
                held[id(self._parameter(entry))][entry.address[2]] = tensor
            new.append(tensor)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if held[id(parameter)]:
                        optimizer.state[self._key(parameter)] = held[id(parameter)]
        return manifest, old, new

    def _items(self) -> Iterator[tuple[Entry, Tensor]]:
        known: set[int] = set()
        for model in self.models.values():
            known.update(id(parameter) for parameter in model.parameters())
        yield from self._model_items()
        for name, optimizer in sorted(self.optimizers.items()):
            yield from self._state_items(name, optimizer, known)

    def _state_items(
        self, name: str, optimizer: Optimizer, known: set[int]
    ) -> Iterator[tuple[Entry, Tensor]]:
        """Tensor state of one optimizer, by group, position and key."""
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if self.models and id(parameter) not in known:
                    raise ConfigError(
                        f"Parameter {index} in group {group_index} of optimizer {name!r} belongs to none of the "
                        "models: hand over every model that is trained."
                    )
                # get(), since indexing a defaultdict would create the state that we only want to look at. Sorted,
                # since a replica that joined has inserted its keys in another order than one that trained from
                # the start.
                for key, value in sorted(
                    optimizer.state.get(self._key(parameter), {}).items(), key=lambda item: str(item[0])
                ):
                    if isinstance(value, Tensor):
                        yield self._state_entry(name, value, (group_index, index, key), parameter), value.detach()

    def _key(self, parameter: Tensor) -> Tensor:
        """What an optimizer keeps the state of a parameter under."""
        return parameter if self.shards is None else self.shards.piece(parameter).stand_in

    def _state_entry(self, name: str, value: Tensor, address: StateAddress, parameter: Tensor) -> Entry:
        """Describe a tensor of an optimizer's state, as a whole."""
        piece = None if self.shards is None else self.shards.piece(parameter)
        if piece is None or piece.sharding is None or (not value.dim() and piece.stand_in.dim()):
            return _described(EntryKind.OPTIMIZER, name, value, address)
        entry = _described(EntryKind.OPTIMIZER, name, value, address)
        stride = torch.empty_like(parameter, device="meta").stride()
        is_like = value.shape == piece.stand_in.shape
        if not is_like or (piece.sharding is Sharding.WHOLE and len(piece.extent) and value.stride() != stride):
            raise ConfigError(
                f"The {entry.label} has the shape {tuple(value.shape)}, which is neither a single number nor like its part "
                f"of the parameter ({tuple(piece.stand_in.shape)}): leave shard_optimizer=True out for this optimizer."
            )
        shape = tuple(parameter.shape)
        stride_kept = None if stride == _row_major(shape) else stride
        return replace(entry, shape=shape, stride=stride_kept, sharding=piece.sharding)

    def _extent(self, entry: Entry) -> range:
        """The bytes of a tensor that are here, in row-major order."""
        sharding = None
        if entry.address is not None and self.shards is not None:
            parameter = self._parameter(entry)
            is_like = tuple(parameter.shape) == entry.shape
            sharding = self.shards.piece(parameter).sharding if is_like else None
        return replace(entry, sharding=sharding).extent(self.cut)

    def _parameter(self, entry: Entry) -> nn.Parameter:
        """The parameter that a tensor of an optimizer's state belongs to."""
        assert entry.address is not None
        group, index, _ = entry.address
        try:
            parameter: nn.Parameter = self.optimizers[entry.name].param_groups[group]["params"][index]
        except (KeyError, IndexError):
            raise TransferError(
                f"A manifest names an unknown {entry.label}: ask for the state again."
            ) from None
        return parameter

    def _model_items(self) -> Iterator[tuple[Entry, Tensor]]:
        """Parameters, then buffers; each shared tensor under the first of its names."""
        seen: set[int] = set()
        names: set[str] = set()
        for kind in (EntryKind.PARAMETER, EntryKind.BUFFER):
            for model_name, model in sorted(self.models.items()):
                named = model.named_parameters() if kind is EntryKind.PARAMETER else model.named_buffers()
                for tensor_name, tensor in named:
                    name = f"{model_name}.{tensor_name}"
                    if name in names:
                        raise ConfigError(f"Two tensors of the models are called {name!r}: rename a model.")
                    names.add(name)
                    if id(tensor) in seen:
                        continue
                    seen.add(id(tensor))
                    stored = self.buffers.get(name, tensor) if kind is EntryKind.BUFFER else tensor
                    yield _described(kind, name, stored), stored.detach()
        unknown = set(self.buffers) - names
        if unknown:
            raise ConfigError(f"The models have no buffer {min(unknown)!r}, which a copy is kept of.")

    @functools.cached_property
    def _saved_names(self) -> dict[str, dict[str, Any]]:
        """For each model, in what its `state_dict()` differs from the manifest, which names each tensor once.

        "also" maps a key of it to the full name of the entry with that tensor (a tied parameter's other names, a key
        that a hook has changed); "unsaved" are full names of what it leaves out (buffers that are not persistent). With
        these a checkpoint can be written that the model loads without any of ours. Found once, since a walk through
        the modules costs as much as all else that is small, and which names a model has does not change.
        """
        full_names: dict[int, str] = {}
        for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
            for model_name, model in sorted(self.models.items()):
                for tensor_name, tensor in kind(model):
                    full_names.setdefault(id(tensor), f"{model_name}.{tensor_name}")
        saved = {}
        for model_name, model in sorted(self.models.items()):
            keys = {
                key: full_names[id(tensor)]
                for key, tensor in model.state_dict(keep_vars=True).items()
                if id(tensor) in full_names
            }
            also = {key: name for key, name in keys.items() if name != f"{model_name}.{key}"}
            own = {name for name in full_names.values() if name.startswith(f"{model_name}.")}
            unsaved = own - {f"{model_name}.{key}" for key in keys}
            saved[model_name] = {"also": also, "unsaved": sorted(unsaved)}
        return saved

    def _small_values(self) -> dict[str, Any]:
        return {
            "models": self._saved_names,
            "optimizers": {
                name: _small_of(name, optimizer, self._key)
                for name, optimizer in sorted(self.optimizers.items())
            },
            "stateful": {name: thing.state_dict() for name, thing in sorted(self.stateful.items())},
        }

    def _check_same_structure(self, values: Any) -> None:
        """The donor has the same optimizers, groups and other things with a state."""
        try:
            theirs = {name: value["sizes"] for name, value in values["optimizers"].items()}
            their_stateful = sorted(values["stateful"])
        except (KeyError, TypeError, AttributeError) as error:
            raise TransferError(f"The small state has no {error}: ask for the state again.") from error
        mine = {name: _group_sizes(optimizer) for name, optimizer in self.optimizers.items()}
        for words, here, there in (
            ("optimizers", sorted(mine), sorted(theirs)),
            ("schedulers, scalers and extra states", sorted(self.stateful), their_stateful),
            *(
                (f"parameters in the groups of optimizer {name!r}", mine[name], theirs.get(name))
                for name in mine
            ),
        ):
            if here != there:
                raise ConfigError(f"The {words} are {here} here and {there} on the donors: {_SAME_PROGRAM}")

    def _state_tensor_for(self, entry: Entry) -> Tensor:
        """The tensor that will hold `entry` or the part of it that belongs here: the present one if it has the same form."""
        if entry.address is None or entry.name not in self.optimizers:
            raise TransferError(
                f"A manifest names an unknown optimizer {entry.name!r}: ask for the state again."
            )
        parameter = self._parameter(entry)
        present = self.optimizers[entry.name].state.get(self._key(parameter), {}).get(entry.address[2])
        dtype = TENSOR_DTYPES[entry.dtype]
        shape, stride = self._form(entry, parameter)
        if (
            isinstance(present, Tensor)
            and (present.shape, present.stride(), present.dtype, present.device.type)
            == (shape, stride, dtype, entry.device)
        ):
            return present.detach()
        # On the CPU by choice (a step counter) or beside its parameter: an optimizer knows no third place.
        device = torch.device("cpu") if entry.device == "cpu" else parameter.device
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def _form(self, entry: Entry, parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of what is here of a tensor of an optimizer's state."""
        extent = self._extent(entry)
        is_split = self.shards is not None and self.shards.piece(parameter).sharding is Sharding.SPLIT
        if (is_split and tuple(parameter.shape) == entry.shape) or len(extent) < entry.size_bytes:
            return (len(extent) // TENSOR_DTYPES[entry.dtype].itemsize,), (1,)
        return entry.shape, entry.stride or _row_major(entry.shape)


def _kinds_of_small(small: str) -> dict[str, list[tuple[str, Any]]]:
    """The parts of a small state by kind, still encoded, since only their owners can decode them."""
    try:
        return {kind: [(name, value) for name, value in part["dict"]] for kind, part in json.loads(small)["dict"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TransferError(f"The small state cannot be read ({error}): ask for the state again.") from error


def joined_small(smalls: Sequence[str]) -> str:
    """The small state of a whole from those of its sections.

    Raises:
        TransferError: one of them is none.
    """
    kinds: dict[str, dict[str, Any]] = {}
    names: dict[str, dict[str, list[Any]]] = {}
    for small in smalls:
        for kind, pairs in _kinds_of_small(small).items():
            if kind == "models":  # whose names in a `state_dict()` are told of by each section for its own
                for model, saved in pairs:
                    for what, value in saved["dict"]:
                        held = value if isinstance(value, list) else value["dict"]
                        names.setdefault(model, {}).setdefault(what, []).extend(held)
            else:
                kinds.setdefault(kind, {}).update(pairs)
    kinds["models"] = {
        model: {"dict": [["also", {"dict": each.get("also", [])}], ["unsaved", each.get("unsaved", [])]]}
        for model, each in names.items()
    }
    return _small_of_kinds(kinds)


def _small_of_kinds(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """The inverse of `_kinds_of_small`."""
    parts = [[kind, {"dict": [[name, value] for name, value in sorted(part.items())]}] for kind, part in kinds.items()]
    return json.dumps({"dict": parts})


class Watch:
    """Tells for little whether a state still consists of the same tensors as when the watch began.

    Looks at every container that `TrainingState` reads them from, and at the memory of each tensor: a parameter, an
    optimizer's state, a module or a parameter group that comes, goes or is exchanged is seen.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        modules = {module for model in state.models.values() for module in model.modules()}
        self._dicts: list[Mapping[Any, Any]] = [
            contents for module in modules for contents in (module._parameters, module._buffers, module._modules)
        ]
        self._dicts.append(state.buffers)
        for optimizer in state.optimizers.values():
            self._dicts.append(optimizer.state)
            self._dicts += [contents for contents in optimizer.state.values() if isinstance(contents, dict)]
        self._contents = self._found()
        self._tensors = list({id(value): value for value in self._contents if isinstance(value, Tensor)}.values())
        self._places = self._memory()

    def unchanged(self) -> bool:
        """Whether `state.described_tensors()` would return what it would have returned then."""
        now = self._found()
        if len(now) != len(self._contents) or not all(map(operator.is_, now, self._contents)):
            pairs = itertools.zip_longest(now, self._contents)
            if any(a is not b and isinstance(a, _WATCHED) | isinstance(b, _WATCHED) for a, b in pairs):
                return False  # A counter that is a plain number changes with each step, and matters to nobody here.
        return self._memory() == self._places

    def _found(self) -> list[Any]:
        groups = [group for optimizer in self._state.optimizers.values() for group in optimizer.param_groups]
        lists = [group["params"] for group in groups]
        return [*itertools.chain.from_iterable([*(contents.values() for contents in self._dicts), *lists])]

    def _memory(self) -> list[tuple[int, torch.Size, tuple[int, ...]]]:
        return [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in self._tensors]


_WATCHED = (Tensor, nn.Module, dict)
_SAME_PROGRAM = "start every worker with the same program and settings."


def _described(kind: EntryKind, name: str, tensor: Tensor, address: StateAddress | None = None) -> Entry:
    check_dense(tensor, f"{kind} {name!r}")
    stride = None
    if address is not None and not tensor.is_contiguous() and _fills_memory(tensor.shape, tensor.stride()):
        stride = tuple(tensor.stride())
    return Entry(
        kind=kind,
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        device=tensor.device.type,
        address=address,
        stride=stride,
    )


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(torch.empty(shape, device="meta").stride())


def _fills_memory(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides visit each place of a block of memory once: some order of dimensions is row-major."""
    if len(shape) != len(stride):
        return False
    expected = 1
    for step, side in sorted(zip(stride, shape, strict=True)):
        if side != 1:
            if step != expected:
                return False
            expected *= side
    return True


def _small_of(name: str, optimizer: Optimizer, key_of: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What an optimizer holds besides parameters and tensor state."""
    state: dict[StateAddress, Any] = {}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            for key, value in optimizer.state.get(key_of(parameter), {}).items():
                if not isinstance(key, str):
                    raise ConfigError(f"Optimizer {name!r} has state under {key!r}, which is not a string.")
                if not isinstance(value, Tensor):
                    state[group_index, index, key] = value
    return {
        "sizes": _group_sizes(optimizer),
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "state": dict(sorted(state.items())),
        # Some optimizers keep state of their own under a string, beside that of the parameters.
        "shared": {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)},
    }


def _group_sizes(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _check_same_model(mine: Sequence[Entry], theirs: Sequence[Entry]) -> None:
    for here, there in zip(mine, theirs, strict=False):
        if (here.kind, here.name) != (there.kind, there.name):
            raise ConfigError(
                f"The model has {here.label} where the donors have {there.label}: {_SAME_PROGRAM}"
            )
        if here.description != there.description:
            raise ConfigError(
                f"The {here.label} is {here.description} here and {there.description} on the donors: "
                f"{_SAME_PROGRAM}"
            )
    if len(mine) != len(theirs):
        longer, where = (mine, "here only") if len(mine) > len(theirs) else (theirs, "on the donors only")
        raise ConfigError(
            f"The model has {longer[min(len(mine), len(theirs))].label} {where}: {_SAME_PROGRAM}"
        )


def _load_groups(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Give each group exactly the donor's settings, in place for tensors: a captured graph reads them."""
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for key in [key for key in group if key != "params" and key not in values]:
            del group[key]
        for key, value in values.items():
            present = group.get(key)
            if isinstance(present, Tensor) and isinstance(value, Tensor) and present.shape == value.shape:
                with torch.no_grad():
                    present.copy_(value)
            else:
                group[key] = value


def _load_state(
    optimizer: Optimizer,
    tensors: Mapping[StateAddress, Tensor],
    small: Mapping[str, Any],
    key_of: Callable[[Tensor], Tensor],
) -> None:
    """Replace an optimizer's state, so that nothing of its own is left over."""
    by_parameter: dict[tuple[int, int], dict[str, Any]] = {}
    for (group, index, key), value in [*small["state"].items(), *tensors.items()]:
        by_parameter.setdefault((group, index), {})[key] = value
    optimizer.state.clear()
    optimizer.state.update(small["shared"])
    for (group, index), state in sorted(by_parameter.items()):
        optimizer.state[key_of(optimizer.param_groups[group]["params"][index])] = state


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _sides(values: Any) -> tuple[int, ...]:
    sides = tuple(_checked(value, int) for value in _checked(values, list))
    if len(sides) > DIMENSIONS_MAX or any(side < 0 for side in sides):
        raise ValueError(f"{values} is no shape")
    return sides


def _address(values: Any) -> StateAddress:
    group, index, key = values
    if _checked(group, int) < 0 or _checked(index, int) < 0:
        raise ValueError(f"{values} is no place in an optimizer")
    return group, index, _checked(key, str)
