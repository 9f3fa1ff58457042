"""Assembling the slices of a snapshot that a node does not hold: read from those who have them, or decoded.

The work goes by chunks of stripes, a few at a time, straight into the images. What must be read for decoding and is
wanted itself is read once. A node that stops answering, or whose bytes are found damaged, is done without as long as its
group allows it. Nothing is handed out before its checksums are right. This file must never decide what is to be restored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from agent.holdings import Image, chunks, cut
from agent.orders import AssemblyOrder
from agent.reading import NotYetError, Reader, Testimony, work_through
from agent.shards import Kind
from agent.tables import Table, shard_bytes
from elastic.errors import ProtocolError, TransferError, Unreachable
from recovery.codec import Codec
from recovery.placement import ProtectionGroup, Stripe

PATIENCE_S = 5.0
"""How long a node that was chosen is asked again for what it does not have yet."""
LOOK_S = 0.02


class AssemblyFailed(TransferError):
    """Something of a snapshot cannot be had any more.

    Attributes:
        lost: the nodes whose slices are lost.
    """

    def __init__(self, message: str, lost: Collection[str]) -> None:
        super().__init__(message)
        self.lost = tuple(sorted(lost))


@dataclass(frozen=True, slots=True)
class _Coded:
    """A group that can be decoded, as far as enough of it is left."""

    group: ProtectionGroup
    block_bytes: int


@dataclass(frozen=True, slots=True)
class _Unit:
    """A chunk of a stripe, or of the shard of a node that is in no group."""

    offset: int
    length: int
    node: str = ""
    coded: _Coded | None = None
    stripe: Stripe | None = None


class Assembly:
    """One order being carried out."""

    def __init__(
        self,
        order: AssemblyOrder,
        node: str,
        reader: Reader,
        held: Collection[int],
        codec: Callable[[int, int], Codec],
        image_bytes_max: int,
    ) -> None:
        """Prepare.

        Args:
            order: what is needed.
            node: this one; what it has itself is preferred.
            reader: of the order's snapshot.
            held: indices of the slices that this node holds and does not need.
            codec: gives that of k and m.
            image_bytes_max: the most memory that the images may take.
        """
        self._order = order
        self._node = node
        self._reader = reader
        self._held = held
        self._codec = codec
        self._image_bytes_max = image_bytes_max
        self._lost = dict.fromkeys(order.decoded, "it is lost")  # node -> why it is not asked
        self._testimonies: dict[str, Testimony] = {}
        self._tables: dict[str, Table] = {}
        self._coded: dict[str, _Coded] = {}
        self._owners: dict[int, str] = {}
        self._images: dict[int, Image] = {}

    async def run(self) -> list[Image]:
        """Return an image of each slice that was needed and not held.

        Raises:
            AssemblyFailed: a slice cannot be had; nothing is kept.
        """
        await self._ask_tables()
        self._make_images()
        wrong = set(self._images)
        while wrong:
            await work_through(list(self._units(wrong)), partial(self._work, frozenset(wrong)))
            wrong = await self._wrong(wrong)
        return list(self._images.values())

    # -- what there is ---------------------------------------------------------------------------------------------

    async def _ask_tables(self) -> None:
        """Learn what each node has; one that does not say is lost."""
        nodes = {*self._order.sources.values(), *(node for group in self._order.groups for node in group.nodes)}
        asked = sorted(nodes - self._lost.keys())
        answers = await asyncio.gather(
            *(self._testimony(node) for node in asked), return_exceptions=True
        )
        for node, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Testimony):
                self._testimonies[node] = answer
                self._tables[node] = answer.table
            elif isinstance(answer, Unreachable | TransferError | ProtocolError):
                self._lost[node] = str(answer)
            else:
                raise answer
        for testimony in self._testimonies.values():
            for node, table in testimony.others.items():
                self._tables.setdefault(node, table)
        for group in self._order.groups:
            if all(node in self._tables for node in group.nodes):
                longest = max(shard_bytes(self._tables[node]) for node in group.nodes)
                self._coded |= dict.fromkeys(group.nodes, _Coded(group, group.block_bytes(longest)))

    async def _testimony(self, node: str) -> Testimony:
        """What a node has. If it was chosen for what its agent holds, its keeper may be told of that only now."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + (PATIENCE_S if node in self._order.sources.values() else 0.0)
        while True:
            try:
                return await self._reader.testimony(node, Kind.TABLES)
            except NotYetError:
                if loop.time() > until_s:
                    raise
            await asyncio.sleep(LOOK_S)

    def _make_images(self) -> None:
        parts = {part.index: (node, part) for node, table in self._tables.items() for part in table}
        needed = [index for index in self._order.indices or range(self._order.count) if index not in self._held]
        missing = [index for index in needed if index not in parts]
        if missing:
            hidden = {self._order.sources[index] for index in missing if index in self._order.sources}
            raise self._failure(f"slices {missing} are in no table that is left", hidden or self._lost.keys())
        size_bytes = sum(parts[index][1].stored_bytes for index in needed)
        if size_bytes > self._image_bytes_max:
            raise AssemblyFailed(
                f"The slices of step {self._order.snapshot.step} that this node needs take {size_bytes} bytes, more than "
                f"the {self._image_bytes_max} allowed: allow more, or restore from a checkpoint.",
                (),
            )
        for index in needed:
            self._owners[index], part = parts[index]
            self._images[index] = Image(part)

    def _units(self, indices: Collection[int]) -> Iterator[_Unit]:
        """The pieces of work that give these slices."""
        nodes = {self._owners[index] for index in indices}
        for coded in dict.fromkeys(self._coded[node] for node in sorted(nodes) if node in self._coded):
            for stripe in coded.group.stripes():
                for offset, length in chunks(coded.block_bytes):
                    unit = _Unit(offset, length, coded=coded, stripe=stripe)
                    if any(self._pieces(unit, row, indices) for row in range(coded.group.k)):
                        yield unit
        for node in sorted(nodes - self._coded.keys()):
            if node in self._lost:
                raise self._failure("no group with all its tables protects it", [node])
            for offset, length in chunks(shard_bytes(self._tables[node])):
                yield _Unit(offset, length, node=node)

    # -- one piece of work -----------------------------------------------------------------------------------------

    async def _work(self, indices: Collection[int], unit: _Unit) -> None:
        if unit.coded is None:
            await self._copy(unit)
        else:
            await self._read_and_decode(unit, unit.coded.group, indices)

    async def _copy(self, unit: _Unit) -> None:
        table = self._tables[unit.node]
        try:
            data = await self._reader.shard(unit.node, unit.offset, unit.length, shard_bytes(table))
        except (Unreachable, TransferError, ProtocolError) as error:
            raise self._failure(f"no group protects it, and: {error}", [unit.node]) from error
        await asyncio.to_thread(self._store, table, unit.offset, data)

    async def _read_and_decode(self, unit: _Unit, group: ProtectionGroup, indices: Collection[int]) -> None:
        wanted = [row for row in range(group.k) if self._pieces(unit, row, indices)]
        have: dict[int, Tensor] = {}
        bad: set[int] = set()
        while True:
            usable = [
                row for row in range(group.k + group.m) if row in have or (row not in bad and self._has(unit, row))
            ]
            chosen = [row for row in wanted if row in usable]
            if len(chosen) < len(wanted):
                others = (row for row in usable if row not in chosen)
                chosen += sorted(others, key=lambda row: (self._member(unit, row) != self._node, row))
                chosen = chosen[: group.k]
                if len(chosen) < group.k:
                    here = {self._member(unit, row) for row in wanted if row not in usable}
                    alike = {self._owners[index] for index in indices} & self._lost.keys() & set(group.nodes)
                    raise self._failure(
                        f"{len(chosen)} blocks of a stripe are left, and the code needs {group.k}", here | alike
                    )
            rows = [row for row in chosen if row not in have]
            if not rows:
                break
            results = await asyncio.gather(*(self._read(unit, row) for row in rows), return_exceptions=True)
            for row, result in zip(rows, results, strict=True):
                match result:
                    case Tensor():
                        have[row] = result
                    case Unreachable():
                        self._lost[self._member(unit, row)] = str(result)
                    case TransferError() | ProtocolError():
                        bad.add(row)
                    case _:
                        raise result
        await asyncio.to_thread(self._decode_and_store, unit, group, have, wanted)

    def _decode_and_store(
        self, unit: _Unit, group: ProtectionGroup, have: Mapping[int, Tensor], wanted: Collection[int]
    ) -> None:
        decoded = {row: torch.empty(unit.length, dtype=torch.uint8) for row in wanted if row not in have}
        if decoded:
            self._codec(group.k, group.m).decode(have, decoded)
        for row in wanted:
            table = self._tables[self._member(unit, row)]
            self._store(table, self._shard_offset(unit, row), decoded[row] if row in decoded else have[row])

    def _store(self, table: Table, offset: int, data: Tensor) -> None:
        """Write a chunk of a shard to the images that want some of it."""
        for number, start, span in cut(table, offset, len(data)):
            image = self._images.get(table[number].index)
            if image is not None:
                image.write(start, data[span.start : span.stop])

    async def _read(self, unit: _Unit, row: int) -> Tensor:
        assert unit.stripe is not None and unit.coded is not None
        node = self._member(unit, row)
        if row >= unit.coded.group.k:
            return await self._reader.parity(node, unit.stripe.number, unit.offset, unit.length)
        size_bytes = shard_bytes(self._tables[node])
        return await self._reader.shard(node, self._shard_offset(unit, row), unit.length, size_bytes)

    # -- members of a stripe ---------------------------------------------------------------------------------------

    def _member(self, unit: _Unit, row: int) -> str:
        """The node that has a row of a stripe: data first, then parity."""
        assert unit.stripe is not None
        data = unit.stripe.data
        return data[row][0] if row < len(data) else unit.stripe.parity[row - len(data)]

    def _has(self, unit: _Unit, row: int) -> bool:
        assert unit.stripe is not None
        node = self._member(unit, row)
        if node in self._lost or node not in self._testimonies:
            return False
        return row < len(unit.stripe.data) or unit.stripe.number in self._testimonies[node].written

    def _shard_offset(self, unit: _Unit, row: int) -> int:
        assert unit.stripe is not None and unit.coded is not None
        return unit.stripe.data[row][1] * unit.coded.block_bytes + unit.offset

    def _pieces(self, unit: _Unit, row: int, indices: Collection[int]) -> bool:
        """Whether some of these slices lie in the chunk of a data row."""
        node = self._member(unit, row)
        if node not in self._tables:
            return False
        table = self._tables[node]
        found = cut(table, self._shard_offset(unit, row), unit.length)
        return any(table[number].index in indices for number, _, _ in found)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def _wrong(self, indices: Collection[int]) -> set[int]:
        """Return the slices that are not what they should be; the nodes that gave them are done without from now on."""
        wrong = set()
        for index in sorted(indices):
            try:
                await asyncio.to_thread(self._images[index].checked)
            except TransferError:
                wrong.add(index)
        suspects = {self._owners[index] for index in wrong} - self._lost.keys()
        if wrong and not suspects:
            raise self._failure(
                f"slices {sorted(wrong)} have other checksums than when they were captured",
                {self._owners[index] for index in wrong},
            )
        self._lost |= dict.fromkeys(suspects, "its slice is damaged")
        return wrong

    def _failure(self, what: str, nodes: Collection[str]) -> AssemblyFailed:
        why = "; ".join(f"{node}: {self._lost[node]}" for node in sorted(self._lost))
        return AssemblyFailed(
            f"Step {self._order.snapshot.step} cannot be assembled: of {', '.join(sorted(nodes)) or 'its nodes'}, {what}"
            f"{f' ({why})' if why else ''}; restore an older snapshot or a checkpoint.",
            nodes,
        )
