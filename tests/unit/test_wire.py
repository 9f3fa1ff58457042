"""Domain values, their messages and their plain form say the same thing."""

from __future__ import annotations

import dataclasses
import json
import math
import typing

import pytest

from elastic import domain
from elastic.errors import ConfigError, ProtocolError
from elastic.v1 import runtime_pb2
from elastic.wire import channels
from elastic.wire.convert import from_plain, from_proto, to_plain, to_proto, unwrap, wrap

MESSAGES = sorted(
    (
        value
        for value in vars(domain).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == domain.__name__
    ),
    key=lambda cls: cls.__name__,
)

PLAN = domain.Plan(
    generation=3,
    kind=domain.PlanKind.FENCE,
    members=(domain.Member("node1/0.1", "node1", 0, 0, "127.0.0.1"), domain.Member("node2/0.4", "node2", 1, 0, "::1")),
    owners=(0, 1, 1),
    virtual_replicas=2,
    store_node="node1",
    store_address="127.0.0.1:4000",
    prepare_timeout_ms=2000,
    reason="worker node2/0.3: killed by SIGKILL",
)
HELLO = domain.AgentHello(
    job="gpt",
    node="node1",
    labels=(("domain", "rack1"), ("island", "a")),
    workers=(
        domain.WorkerStatus(
            worker="node1/0.1",
            loss=0.5,
            messages=(domain.Registered(domain.TrainingSpec(slots=4)), domain.Failed(step=2, sample_ids=(1, 2))),
        ),
    ),
)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_a_domain_class_and_its_message_have_the_same_fields(cls: type) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields == set(getattr(runtime_pb2, cls.__name__).DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_default_values_survive_the_wire(cls: type) -> None:
    value = cls()
    message = type(to_proto(value)).FromString(to_proto(value).SerializeToString())
    back = from_proto(message, cls)
    if any(isinstance(getattr(value, f.name), float) and math.isnan(getattr(value, f.name)) for f in dataclasses.fields(cls)):
        assert to_plain(back) == to_plain(value)
    else:
        assert back == value


@pytest.mark.parametrize(
    ("wrapper", "value"),
    [
        ("ControllerMessage", domain.ToWorker("node1/0.1", domain.Prepare(PLAN))),
        ("AgentMessage", HELLO),
        ("AgentMessage", domain.FromWorker("w", domain.Prepared(2, 7, 8, True))),
        ("WorkerCommand", domain.Commit(3, 7, (2,))),
    ],
)
def test_nested_values_survive_the_wire_and_json(wrapper: str, value: object) -> None:
    message = wrap(wrapper, value)
    assert unwrap(type(message).FromString(message.SerializeToString())) == value
    assert from_plain(json.loads(json.dumps(to_plain(value))), type(value)) == value


def test_every_alternative_has_a_place_in_its_wrapper() -> None:
    for wrapper in ("WorkerMessage", "WorkerCommand", "AgentMessage", "ControllerMessage"):
        alternatives = {cls.__name__ for cls in typing.get_args(getattr(domain, wrapper))}
        body = getattr(runtime_pb2, wrapper).DESCRIPTOR.oneofs_by_name["body"]
        assert {field.message_type.name for field in body.fields} == alternatives


def test_a_wrapper_without_a_body_is_refused_with_the_remedy() -> None:
    with pytest.raises(ProtocolError, match="one version of elastic-runtime"):
        unwrap(runtime_pb2.AgentMessage())


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:port", "host:70000"])
def test_a_bad_address_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--controller"):
        channels.parse_address(text, what="--controller")


def test_addresses_round_trip() -> None:
    for host, port in (("127.0.0.1", 29400), ("::1", 1), ("node-1.example", 65535)):
        assert channels.parse_address(channels.join_address(host, port), what="x") == (host, port)
