"""What an agent tells its keeper, as values and as the JSON that carries them. This file must never import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from agent.protection import World
from elastic.snapshots import SnapshotId
from recovery.placement import ProtectionGroup

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class KeeperSettings:
    """What a keeper is started with.

    Attributes:
        address: the IP address at which it listens; the port is the system's choice.
        parity_bytes_max: memory for parity, all snapshots together.
        image_bytes_max: memory for one assembly.
        silence_s: how long a peer that was asked may say nothing before it is asked again.
        public_key, secret_key: its CURVE keys (Z85 text); both "" for no encryption.
    """

    address: str = "127.0.0.1"
    parity_bytes_max: int = 64 * GIB
    image_bytes_max: int = 256 * GIB
    silence_s: float = 1.0
    public_key: str = ""
    secret_key: str = field(default="", repr=False)

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AssemblyOrder:
    """Which slices a node needs and where they are to be had.

    Attributes:
        snapshot: which one.
        count: of how many slices it consists.
        sources: index -> node that has this slice.
        decoded: nodes that are lost, whose slices come out of their groups' parity.
        groups: the protection groups of the snapshot's generation, at least those with a lost node; none for those of
            the world that the keeper knows.
        indices: the slices that are needed; none for all. Those that the keeper holds are not assembled.
    """

    snapshot: SnapshotId
    count: int
    sources: Mapping[int, str]
    decoded: tuple[str, ...] = ()
    groups: tuple[ProtectionGroup, ...] = ()
    indices: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        return {
            "snapshot": asdict(self.snapshot),
            "count": self.count,
            "sources": {str(index): node for index, node in self.sources.items()},
            "decoded": list(self.decoded),
            "groups": [asdict(group) for group in self.groups],
            "indices": list(self.indices),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AssemblyOrder:
        """The inverse of `to_json`."""
        return cls(
            SnapshotId(**value["snapshot"]),
            value["count"],
            {int(index): node for index, node in value["sources"].items()},
            tuple(value["decoded"]),
            _groups(value["groups"]),
            tuple(value["indices"]),
        )


def world_to_json(world: World) -> dict[str, Any]:
    """A world as an object of JSON."""
    return {
        "generation": world.generation,
        "node": world.node,
        "peers": dict(world.peers),
        "slices": {node: list(indices) for node, indices in world.slices.items()},
        "groups": [asdict(group) for group in world.groups],
    }


def world_from_json(value: Mapping[str, Any]) -> World:
    """The inverse of `world_to_json`."""
    slices = {node: tuple(indices) for node, indices in value["slices"].items()}
    return World(value["generation"], value["node"], dict(value["peers"]), slices, _groups(value["groups"]))


def _groups(values: list[dict[str, Any]]) -> tuple[ProtectionGroup, ...]:
    return tuple(ProtectionGroup(tuple(value["nodes"]), value["k"], value["m"]) for value in values)
