"""Small Python objects as JSON text, and tensors as raw bytes.

For what a `state_dict()` holds besides tensors: hyper-parameters, counters, a scheduler's fields. Every value
comes back with its type and its bits; what cannot is refused by name, never approximated. This module must
never evaluate or unpickle anything, and never builds an object of a type that is not in the list below.

Written as they are: None, bool, int, str, list and finite float. Everything else is an object with one key,
the tag: `tuple`, `dict` (pairs, so that keys keep their types), `ordered` (OrderedDict), `counter`, `set`,
`frozenset`, `bytes` (base64), `float` (inf, -inf, nan), `size` (torch.Size), `dtype`, `device`, `tensor`,
`array` (numpy), `numpy` (a numpy scalar), and `own`: something that is code, not state (a function), which
the receiver keeps as it has it.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import functools
import json
import math
import mmap
import re
import sys
import types
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from elastic.errors import ConfigError, TransferError

ENCODED_SIZE_BYTES_MAX = 64 * 2**20
TENSOR_SIZE_BYTES_MAX = 64 * 2**10
INTEGER_BITS_MAX = 4096
DEPTH_MAX = 64

TENSOR_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
"""Every dtype by the name that manifests and encoded tensors use, such as "bfloat16"."""

_CODE_TYPES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    type,
    weakref.ref,
)
_NUMPY_DTYPE = re.compile(r"[<>|][biufcSUmM]\d{1,4}(\[\d*[a-zA-Zμ]+\])?")
_ABSENT: Any = object()


def encode(value: object, what: str = "state") -> str:
    """`value` as ASCII JSON text that `decode` turns back into an equal value of the same types.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict, Counter, set, frozenset,
            small tensors and numpy scalars or arrays, dtypes and devices, nested to any sensible depth.
        what: how an error names `value`.

    Raises:
        ConfigError: something inside is of another type (named by its path), or too large.
    """
    text = json.dumps(_encoded(value, what, 0), separators=(",", ":"), allow_nan=False)
    if len(text) > ENCODED_SIZE_BYTES_MAX:
        raise ConfigError(
            f"{what} takes {len(text)} bytes as text, more than the {ENCODED_SIZE_BYTES_MAX} that fit: "
            "keep large data in tensors of a model or an optimizer."
        )
    return text


def decode(text: str, own: object = _ABSENT, what: str = "state") -> Any:
    """The value that `encode` was given.

    Args:
        text: output of `encode`. own: the receiver's value of the same structure. Where the sender had a
            function, the receiver's is taken from
            the same place; a dict entry without a counterpart is left out.
        what: how an error names the value.

    Raises:
        TransferError: `text` is malformed or too large.
        ConfigError: a function inside a list or tuple has no counterpart in `own`.
    """
    if len(text) > ENCODED_SIZE_BYTES_MAX:
        raise TransferError(
            f"{what} has {len(text)} bytes of text, more than {ENCODED_SIZE_BYTES_MAX}: it is damaged."
        )
    try:
        value = _decoded(json.loads(text, parse_constant=_refuse_constant), own, what, 0)
    except (ValueError, TypeError, KeyError, RecursionError, RuntimeError, OverflowError) as error:
        raise TransferError(f"{what} cannot be decoded ({error}): send it again.") from error
    if value is _ABSENT:
        raise ConfigError(f"{what} is a function on the sender, and the receiver has none in its place.")
    return value


def check_dense(tensor: torch.Tensor, what: str) -> None:
    """Raise `ConfigError` unless `tensor` is an ordinary one: its own memory, one value per element."""
    is_wrapper = hasattr(tensor, "__tensor_flatten__")  # DTensor and kin hold other tensors, not memory.
    is_lazy = isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    if is_wrapper or is_lazy or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ConfigError(
            f"{what} is a {type(tensor).__qualname__} ({tensor.layout}, {tensor.dtype}, on {tensor.device}), "
            "and only ordinary dense tensors with memory of their own can be sent to other workers."
        )


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in row-major order: uint8, one dimension, same device; a view if contiguous."""
    flat = tensor.detach()
    if flat.is_conj() or flat.is_neg():
        flat = flat.resolve_conj().resolve_neg()
    return flat.contiguous().reshape(-1).view(torch.uint8)


def raw_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy. The caller keeps the tensor alive meanwhile."""
    size_bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("only a contiguous CPU tensor can be viewed as memory")
    if not size_bytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size_bytes).from_address(tensor.data_ptr())).cast("B")


def tensor_over(memory: mmap.mmap) -> torch.Tensor:
    """Mapped memory as a tensor, uint8, [its length]; it stays mapped for as long as the tensor lives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that memory mapped to be read cannot be written to, as is meant
        return torch.frombuffer(memory, dtype=torch.uint8)


def _encoded(value: Any, path: str, depth: int) -> Any:
    """`value` in JSON's own types."""
    if depth > DEPTH_MAX:
        raise ConfigError(
            f"{path} is nested more than {DEPTH_MAX} deep or contains itself: keep the state flat."
        )
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        if value.bit_length() > INTEGER_BITS_MAX:
            raise ConfigError(
                f"{path} is an integer of {value.bit_length()} bits, more than {INTEGER_BITS_MAX}."
            )
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return _encoded_items(value, path, depth)
    container = _CONTAINERS.get(kind)
    if container is not None:
        return {container: _encoded_items(value, path, depth)}
    mapping = _MAPPINGS.get(kind)
    if mapping is not None:
        pairs = [
            [_encoded(key, f"a key of {path}", depth + 1), _encoded(item, f"{path}[{key!r}]", depth + 1)]
            for key, item in value.items()
        ]
        return {mapping: pairs}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"device": str(value)}
    if isinstance(value, torch.Tensor):
        return {"tensor": _encoded_tensor(value, path)}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
        return _encoded_numpy(value, path, is_scalar=isinstance(value, numpy.generic))
    if isinstance(value, _CODE_TYPES):
        return {"own": getattr(value, "__qualname__", kind.__qualname__)}
    raise ConfigError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which cannot be sent to other workers: keep it "
        "out of the state_dict, or turn it into numbers, strings, lists, dicts or small tensors there."
    )


def _encoded_items(values: Iterable[Any], path: str, depth: int) -> list[Any]:
    return [_encoded(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(values)]


def _encoded_tensor(tensor: torch.Tensor, path: str) -> list[Any]:
    """[dtype, shape, base64 of the bytes]; the device is the receiver's business."""
    check_dense(tensor, path)
    _check_small(tensor.numel() * tensor.element_size(), path)
    data = flat_bytes(tensor).cpu()
    return [
        str(tensor.dtype).removeprefix("torch."),
        list(tensor.shape),
        base64.b64encode(raw_view(data)).decode("ascii"),
    ]


def _encoded_numpy(value: Any, path: str, *, is_scalar: bool) -> dict[str, Any]:
    """Scalars and arrays alike, as [dtype, shape, base64]."""
    if not _NUMPY_DTYPE.fullmatch(value.dtype.str):
        raise ConfigError(
            f"{path} is numpy data of type {value.dtype}: only numbers, text and dates can be sent."
        )
    _check_small(value.nbytes, path)
    data = base64.b64encode(value.tobytes()).decode("ascii")
    return {"numpy" if is_scalar else "array": [value.dtype.str, list(value.shape), data]}


def _check_small(size_bytes: int, path: str) -> None:
    if size_bytes > TENSOR_SIZE_BYTES_MAX:
        raise ConfigError(
            f"{path} is a tensor of {size_bytes} bytes, more than the {TENSOR_SIZE_BYTES_MAX} allowed among "
            "small state: hand it over as a parameter or buffer of a model, or as an optimizer's tensor."
        )


def _decoded(value: Any, own: Any, path: str, depth: int) -> Any:
    """The inverse of `_encoded`; `_ABSENT` for a function that `own` does not have."""
    if depth > 2 * DEPTH_MAX:  # A sender's own bound is lower; this one only keeps the interpreter's stack.
        raise ValueError(f"{path} is nested too deep")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return _decoded_items(value, own if type(own) is list else (), path, depth)
    if len(value) != 1:
        raise ValueError(f"{path} carries {len(value)} tags instead of one")
    ((tag, content),) = value.items()
    if tag == "own":
        return own
    if tag in _CONTAINER_MAKERS:
        make, owner = _CONTAINER_MAKERS[tag]
        items = own if owner in (tuple, list) and type(own) is owner else ()
        return make(_decoded_items(content, items, path, depth))
    if tag in _MAPPING_MAKERS:
        return _decoded_mapping(tag, content, own, path, depth)
    return _LEAF_MAKERS[tag](content)


def _decoded_items(values: Any, own: Any, path: str, depth: int) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError(f"{path} should be a list")
    items = []
    for index, item in enumerate(values):
        counterpart = own[index] if index < len(own) else _ABSENT
        decoded = _decoded(item, counterpart, f"{path}[{index}]", depth + 1)
        if decoded is _ABSENT:
            raise ConfigError(
                f"{path}[{index}] is a function ({item['own']}) on the sender, and the receiver has none "
                "in its place: build the same optimizers and schedulers on every worker."
            )
        items.append(decoded)
    return items


def _decoded_mapping(tag: str, pairs: Any, own: Any, path: str, depth: int) -> Any:
    mapping = _MAPPING_MAKERS[tag]()
    counterparts = own if isinstance(own, dict) else {}
    for pair in pairs:
        encoded_key, encoded_item = pair
        key = _decoded(encoded_key, _ABSENT, f"a key of {path}", depth + 1)
        if key in mapping:
            raise ValueError(f"{path} has the key {key!r} twice")
        item = _decoded(encoded_item, counterparts.get(key, _ABSENT), f"{path}[{key!r}]", depth + 1)
        if item is not _ABSENT:
            mapping[key] = item
    return mapping


def _decoded_bytes(content: Any) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"bytes are not base64 ({error})") from error


def _decoded_float(content: Any) -> float:
    return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]


def _decoded_dtype(content: Any) -> torch.dtype:
    return TENSOR_DTYPES[content]


def _decoded_device(content: Any) -> torch.device:
    return torch.device(content)


def _decoded_tensor(content: Any) -> torch.Tensor:
    name, shape, data = content
    raw, dtype = bytearray(_decoded_bytes(data)), TENSOR_DTYPES[name]
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"a tensor cannot have the shape {shape}")
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes for a {name} tensor of shape {shape}")
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).clone()  # frombuffer borrows the bytearray; a clone owns its memory.


def _decoded_array(content: Any) -> Any:
    import numpy  # Only a sender that uses numpy sends this, and it must stay optional.

    name, shape, data = content
    if not _NUMPY_DTYPE.fullmatch(name):
        raise ValueError(f"{name!r} is no numpy type that is ever sent")
    # A shape of negative sides would be guessed by numpy; bytes() makes the copy writable and owned.
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"an array cannot have the shape {shape}")
    return numpy.frombuffer(_decoded_bytes(data), dtype=numpy.dtype(name)).reshape(shape).copy()


def _decoded_numpy(content: Any) -> Any:
    return _decoded_array(content)[()]


_CONTAINERS: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}
_CONTAINER_MAKERS: dict[str, tuple[Callable[[list[Any]], Any], type]] = {
    "tuple": (tuple, tuple),
    "set": (set, set),
    "frozenset": (frozenset, frozenset),
    "size": (torch.Size, torch.Size),
}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_MAPPING_MAKERS: dict[str, Callable[[], dict[Any, Any]]] = {
    "dict": dict,
    "ordered": OrderedDict,
    "counter": Counter,
}
_LEAF_MAKERS: dict[str, Callable[[Any], Any]] = {
    "bytes": _decoded_bytes,
    "float": _decoded_float,
    "dtype": _decoded_dtype,
    "device": _decoded_device,
    "tensor": _decoded_tensor,
    "array": _decoded_array,
    "numpy": _decoded_numpy,
}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} stands where a number should")
