"""Translate between domain values, protobuf messages and plain JSON data.

One reflective translator serves all messages: a domain class has the name and the fields of its message, so that a
field added to one side only is found by `tests/unit/test_wire.py`, not by a user.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from typing import Any, TypeVar

from google.protobuf.message import Message

from elastic import domain
from elastic.errors import ProtocolError
from elastic.v1 import runtime_pb2

T = TypeVar("T")

# A field that holds "one of several messages" travels in a message with a oneof called body.
_WRAPPERS: dict[frozenset[type], str] = {
    frozenset(typing.get_args(domain.WorkerMessage)): "WorkerMessage",
    frozenset(typing.get_args(domain.WorkerCommand)): "WorkerCommand",
    frozenset(typing.get_args(domain.AgentMessage)): "AgentMessage",
    frozenset(typing.get_args(domain.ControllerMessage)): "ControllerMessage",
}


_HINTS: dict[Any, dict[str, Any]] = {}


def _hints(cls: Any) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


@functools.cache
def _wrapper_of(annotation: Any) -> str | None:
    if isinstance(annotation, types.UnionType):
        return _WRAPPERS.get(frozenset(typing.get_args(annotation)))
    return None


@functools.cache
def _body_fields(wrapper: str) -> dict[str, str]:
    """Name of the message in a wrapper's body -> name of its field."""
    descriptor = getattr(runtime_pb2, wrapper).DESCRIPTOR
    return {field.message_type.name: field.name for field in descriptor.oneofs_by_name["body"].fields}


def to_proto(value: Any) -> Any:
    """Return the protobuf message of a domain value."""
    message = getattr(runtime_pb2, type(value).__name__)()
    for name, annotation in _hints(type(value)).items():
        _put(message, name, getattr(value, name), annotation)
    return message


def _put(message: Message, name: str, item: Any, annotation: Any) -> None:
    if typing.get_origin(annotation) is tuple:
        target = getattr(message, name)
        inner = typing.get_args(annotation)[0]
        if typing.get_origin(inner) is tuple:  # pairs: a map
            for key, entry in item:
                target[key] = entry
        elif dataclasses.is_dataclass(inner):
            target.extend(to_proto(entry) for entry in item)
        elif (wrapper := _wrapper_of(inner)) is not None:
            target.extend(wrap(wrapper, entry) for entry in item)
        else:
            target.extend(item)
    elif (wrapper := _wrapper_of(annotation)) is not None:
        getattr(message, name).CopyFrom(wrap(wrapper, item))
    elif dataclasses.is_dataclass(annotation):
        getattr(message, name).CopyFrom(to_proto(item))
    else:
        setattr(message, name, item)


def from_proto(message: Any, cls: type[T]) -> T:
    """Return the domain value of class `cls` that a protobuf message carries."""
    return cls(**{name: _get(getattr(message, name), hint) for name, hint in _hints(cls).items()})


def _get(item: Any, annotation: Any) -> Any:
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)[0]
        if typing.get_origin(inner) is tuple:
            return tuple(sorted(item.items()))
        return tuple(_get(entry, inner) for entry in item)
    if _wrapper_of(annotation) is not None:
        return unwrap(item)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return from_proto(item, annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return annotation(item)
    return item


def wrap(wrapper: str, value: Any) -> Any:
    """Return the message `wrapper` whose body is this domain value."""
    outer = getattr(runtime_pb2, wrapper)()
    getattr(outer, _body_fields(wrapper)[type(value).__name__]).CopyFrom(to_proto(value))
    return outer


def unwrap(outer: Any) -> Any:
    """Return the domain value in a wrapper's body; raises ProtocolError when it is empty."""
    name = outer.WhichOneof("body")
    if name is None:
        raise ProtocolError(
            f"a {type(outer).__name__} without a body arrived: its sender speaks another protocol version; "
            "use one version of elastic-runtime on all nodes"
        )
    inner = getattr(outer, name)
    return from_proto(inner, getattr(domain, type(inner).__name__))


def to_plain(value: Any) -> Any:
    """Return a domain value as data that JSON can hold (tuples become lists, NaN becomes None)."""
    if dataclasses.is_dataclass(value):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if _is_alternative(type(value)):
            plain["is"] = type(value).__name__
        return plain
    if isinstance(value, tuple | list | frozenset):
        return [to_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_alternative(cls: object) -> bool:
    return any(cls in members for members in _WRAPPERS)


def from_plain(plain: Any, annotation: Any) -> Any:
    """Return the value of type `annotation` that `to_plain` turned into `plain`."""
    if typing.get_origin(annotation) is tuple:
        inner, *rest = typing.get_args(annotation)
        if rest and rest[0] is not Ellipsis:
            return tuple(plain)
        return tuple(from_plain(entry, inner) for entry in plain)
    if _wrapper_of(annotation) is not None:
        return from_plain(plain, getattr(domain, plain["is"]))
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        hints = _hints(annotation)
        return annotation(**{k: from_plain(v, hints[k]) for k, v in plain.items() if k in hints})
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return annotation[plain]
    if annotation is float and plain is None:
        return math.nan
    return plain
