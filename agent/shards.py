"""How bytes of snapshots travel between keepers: requests and replies over ZeroMQ.

Everything is asked for: a DEALER for each peer sends small requests, a ROUTER answers them straight from memory. At most
`credits` requests to a peer are outstanding, so neither side ever holds more than that many replies. Every reply echoes
its request and carries the CRC-32 of its data. One that does not come is asked for again, one that is damaged once more,
and then it is an error of this peer. Frames are bounded, and one that is not understood is counted and dropped or
refused. This file must never unpickle, and knows nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import zmq
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import parse_monitor_message

from agent.keys import Keys
from elastic.checksum import crc32
from elastic.errors import ConfigError, TransferError, Unreachable
from elastic.snapshots import SnapshotId

CHUNK_BYTES = 1 << 20
"""The most data in one reply."""
NAME_BYTES_MAX = 255
CREDITS = 8
SILENCE_S = 1.0
TRIES = 2
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1000
_BACKLOG_FRAMES = 256
_MESSAGES_AT_ONCE = 16
_BARRED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

_REQUEST = struct.Struct("!4sBHQqqQI")
_REPLY = struct.Struct("!4sBI")
_MAGIC = b"elk1"

Buffer = bytes | memoryview


class Kind(IntEnum):
    """What is asked for."""

    TABLE = 1
    """The node's own table, and the stripes whose parity it holds."""
    TABLES = 2
    """The same, and the tables of the others in its group."""
    SHARD = 3
    """Bytes of the node's own shard."""
    PARITY = 4
    """Bytes of the parity of a stripe that it holds."""
    HELD = 5
    """A notice: the sender holds the parity of a stripe in which this node has a block."""


class Status(IntEnum):
    """What became of a request."""

    OK = 0
    NOT_YET = 1
    GONE = 2
    REFUSED = 3


_KINDS, _STATUSES = frozenset(Kind), frozenset(Status)


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    Attributes:
        offset, length: which bytes of the shard or of the parity block.
        sender: the node that asks.
    """

    kind: Kind
    snapshot: SnapshotId
    stripe: int = 0
    offset: int = 0
    length: int = 0
    sender: str = ""

    def pack(self, number: int) -> bytes:
        """The request as a frame."""
        step, generation = self.snapshot.step, self.snapshot.generation
        fixed = _REQUEST.pack(_MAGIC, self.kind, self.stripe, number, step, generation, self.offset, self.length)
        return fixed + self.sender.encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node answers: data, or in words why not.

    Attributes:
        crc: the CRC-32 of the data as it should be, which may be older than the data.
    """

    status: Status
    data: Buffer
    crc: int

    @classmethod
    def of(cls, status: Status, data: bytes) -> Answer:
        """An answer whose checksum is made now."""
        return cls(status, data, crc32(data))


@dataclass(slots=True)
class Traffic:
    """What has passed, counted.

    Attributes:
        received_bytes, sent_bytes: data alone.
        retries: replies that had to be asked for again.
        damaged: replies whose checksum was wrong.
        refused: frames that were not understood or not to be answered.
        stale: replies to nothing that was asked, or not any more.
    """

    received_bytes: int = 0
    sent_bytes: int = 0
    retries: int = 0
    damaged: int = 0
    refused: int = 0
    stale: int = 0


def parse_request(frame: Buffer) -> tuple[int, Request] | None:
    """Return the request of a frame with its number; None if it is none."""
    if not _REQUEST.size <= len(frame) <= _REQUEST.size + NAME_BYTES_MAX:
        return None
    magic, kind, stripe, number, step, generation, offset, length = _REQUEST.unpack_from(frame)
    if magic != _MAGIC or kind not in _KINDS or length > CHUNK_BYTES:
        return None
    try:
        sender = str(frame[_REQUEST.size :], "utf-8")
    except UnicodeDecodeError:
        return None
    return number, Request(Kind(kind), SnapshotId(step, generation), stripe, offset, length, sender)


class _Wire:
    """A ZeroMQ socket in the running loop, at a fraction of what zmq.asyncio costs a message.

    Its descriptor tells of a change only, not of a state: whatever may have changed it is followed by a look.
    """

    def __init__(self, socket: zmq.Socket[bytes], received: Callable[[list[zmq.Frame]], None]) -> None:
        self.socket = socket
        self._received = received
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._look)
        self._loop.call_soon(self._look)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send at once, large frames without a copy; raises zmq.Again where too much is waiting already."""
        self.socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
        self._loop.call_soon(self._look)

    def close(self) -> None:
        if not self.socket.closed:
            self._loop.remove_reader(self._descriptor)
            self.socket.close(0)

    def _look(self) -> None:
        for _ in range(_MESSAGES_AT_ONCE):
            if self.socket.closed:
                return
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            self._received(frames)
        self._loop.call_soon(self._look)  # others have their turn first


class ShardServer:
    """Answers the other keepers for as long as the loop runs."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        answer: Callable[[Request], Answer],
        traffic: Traffic,
        keys: Keys | None = None,
    ) -> None:
        """Listen.

        Args:
            context: of this process.
            address: an IP address; the port is the system's choice.
            answer: says what to reply, at once.
            traffic: where to count.
            keys: of this node; None for no encryption.

        Raises:
            ConfigError: the address cannot be listened at.
        """
        self._answer = answer
        self._traffic = traffic
        self.allowed: frozenset[str] = frozenset()
        """Public keys of those who may ask, where there are keys."""
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, _REQUEST.size + NAME_BYTES_MAX)
        socket.setsockopt(zmq.SNDHWM, _BACKLOG_FRAMES)
        socket.setsockopt(zmq.RCVHWM, _BACKLOG_FRAMES)
        self._wire = _Wire(socket, self._serve)
        self._authenticator: AsyncioAuthenticator | None = None
        if keys is not None:
            self._authenticator = AsyncioAuthenticator(context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", self)
            socket.curve_publickey = keys.public.encode()
            socket.curve_secretkey = keys.secret.encode()
            socket.curve_server = True
        host = f"[{address}]" if ":" in address else address
        socket.setsockopt(zmq.IPV6, int(":" in address))
        try:
            socket.bind(f"tcp://{host}:0")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"The keeper cannot listen at {address} ({error}): name an address of this node."
            ) from error
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether the owner of a public key may ask (the authenticator's interface)."""
        return key.decode("ascii", "replace") in self.allowed

    def close(self) -> None:
        """Stop listening."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._wire.close()

    def _serve(self, frames: list[zmq.Frame]) -> None:
        identity, *rest = frames
        parsed = parse_request(rest[0].buffer) if len(rest) == 1 else None
        if parsed is None:
            self._traffic.refused += 1
            return
        _, request = parsed
        answer = self._answer(request)
        self._traffic.refused += answer.status is Status.REFUSED
        self._traffic.sent_bytes += len(answer.data)
        header = _REPLY.pack(_MAGIC, answer.status, answer.crc) + bytes(rest[0].buffer[: _REQUEST.size])
        self._wire.send([identity.bytes, header, answer.data])  # never too much: a ROUTER drops, and is asked again


class _Lost(Exception):
    """No reply to one try."""


@dataclass(slots=True)
class _Asked:
    header: bytes
    reply: asyncio.Future[Answer]


class Peer:
    """Asks one other keeper."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        node: str,
        address: str,
        traffic: Traffic,
        *,
        silence_s: float = SILENCE_S,
        credits: int = CREDITS,
        keys: Keys | None = None,
        public_key: str = "",
    ) -> None:
        """Begin to connect.

        Args:
            context: of this process.
            node, address: whom to ask, and where it listens.
            traffic: where to count.
            silence_s: how long nothing may come while something is outstanding.
            credits: how many requests may be outstanding.
            keys, public_key: this node's, and the peer's; without them nothing is encrypted.
        """
        self.node, self.address, self.public_key = node, address, public_key
        self._traffic = traffic
        self._silence_s = silence_s
        self._credits = asyncio.Semaphore(credits)
        self._outstanding: dict[int, _Asked] = {}
        self._number = 0
        self._is_refused = self._is_barred = False
        self._loop = asyncio.get_running_loop()
        self._quiet_since_s = self._loop.time()
        socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, CHUNK_BYTES),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
            (zmq.SNDHWM, _BACKLOG_FRAMES),
            (zmq.IPV6, int("[" in address)),
        ):
            socket.setsockopt(option, value)
        if keys is not None:
            socket.curve_publickey = keys.public.encode()
            socket.curve_secretkey = keys.secret.encode()
            socket.curve_serverkey = public_key.encode()
        events = zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED | _BARRED
        self._monitor = _Wire(socket.get_monitor_socket(events), self._learn)
        self._wire = _Wire(socket, self._read)
        socket.connect(address)
        self._watching = asyncio.create_task(self._watch())

    async def ask(self, request: Request) -> Answer:
        """Return the answer, whose checksum has been found right.

        Raises:
            Unreachable: the peer does not answer.
            TransferError: its answer is damaged, again and again.
        """
        async with self._credits:
            lost = damaged = 0
            while True:
                if self._is_refused or lost == TRIES:
                    raise Unreachable(f"The keeper of {self.node} at {self.address} does not answer; do without it.")
                try:
                    answer = await self._ask_once(request)
                except _Lost:
                    lost += 1
                else:
                    if crc32(answer.data) == answer.crc:
                        self._traffic.received_bytes += len(answer.data)
                        return answer
                    self._traffic.damaged += 1
                    damaged += 1
                    if damaged == TRIES:
                        raise TransferError(
                            f"What {self.node} sent for step {request.snapshot.step} is damaged (its CRC differs); "
                            "rebuild it from the others of its group."
                        )
                self._traffic.retries += 1

    def close(self) -> None:
        """Ask nothing more; whoever waits gets Unreachable."""
        self._is_refused = True
        self._lose_all()
        self._watching.cancel()
        self._wire.socket.disable_monitor()
        self._monitor.close()
        self._wire.close()

    async def _ask_once(self, request: Request) -> Answer:
        self._number += 1
        number = self._number
        frame = request.pack(number)
        if not self._outstanding:
            self._quiet_since_s = self._loop.time()
        asked = self._outstanding[number] = _Asked(frame[: _REQUEST.size], self._loop.create_future())
        try:
            try:
                self._wire.send([frame])
            except zmq.Again as error:
                raise _Lost from error
            return await asked.reply
        finally:
            del self._outstanding[number]

    def _read(self, frames: list[zmq.Frame]) -> None:
        self._quiet_since_s = self._loop.time()
        if len(frames) != 2 or len(frames[0]) != _REPLY.size + _REQUEST.size:
            self._traffic.refused += 1
            return
        header, data = frames[0].buffer, frames[1].buffer
        magic, status, crc = _REPLY.unpack_from(header)
        echo = bytes(header[_REPLY.size :])
        asked = self._outstanding.get(_REQUEST.unpack(echo)[3])
        if asked is None or asked.header != echo or asked.reply.done():
            self._traffic.stale += 1
        elif magic != _MAGIC or status not in _STATUSES:
            self._traffic.refused += 1
        else:
            asked.reply.set_result(Answer(Status(status), data, crc))

    async def _watch(self) -> None:
        """Nothing is believed to be on its way after a long silence, and a peer that barred us may know us by now."""
        while True:
            await asyncio.sleep(self._silence_s / 4)
            if self._is_barred:
                self._is_barred = False
                with contextlib.suppress(zmq.ZMQError):  # the library has given the connection up by itself
                    self._wire.socket.disconnect(self.address)
                self._wire.socket.connect(self.address)
            if self._outstanding and self._loop.time() - self._quiet_since_s > self._silence_s:
                self._lose_all()
                self._quiet_since_s = self._loop.time()

    def _learn(self, frames: list[zmq.Frame]) -> None:
        """A broken connection loses what was asked over it; one that is refused says that nobody is there."""
        event = parse_monitor_message([frame.bytes for frame in frames])["event"]
        self._is_barred |= bool(event & _BARRED)
        self._is_refused = event == zmq.EVENT_CLOSED or self._is_barred
        if event != zmq.EVENT_CONNECTED:
            self._lose_all()

    def _lose_all(self) -> None:
        for asked in self._outstanding.values():
            if not asked.reply.done():
                asked.reply.set_exception(_Lost())


class Peers:
    """Asks every other keeper that this node was told of, and this node itself, which needs no network."""

    def __init__(self, own: Callable[[Request], Answer], connect: Callable[[str, str, str], Peer]) -> None:
        """Begin with nobody.

        Args:
            own: answers for this node.
            connect: makes the Peer of a node, an address and a public key.
        """
        self._own = own
        self._connect = connect
        self._node = ""
        self._peers: dict[str, Peer] = {}

    def update(self, node: str, addresses: Mapping[str, str], public_keys: Mapping[str, str]) -> None:
        """Take in who this node is and where the others listen; unchanged ones stay connected."""
        self._node = node
        for name, peer in list(self._peers.items()):
            if (addresses.get(name), public_keys.get(name, "")) != (peer.address, peer.public_key) or name == node:
                self._peers.pop(name).close()
        for name, address in addresses.items():
            if name != node and name not in self._peers:
                self._peers[name] = self._connect(name, address, public_keys.get(name, ""))

    def ask(self, node: str, request: Request) -> Awaitable[Answer]:
        """Return the answer of a node, this one included; raises as `Peer.ask`."""
        if node == self._node:
            return self._ask_own(request)
        peer = self._peers.get(node)
        if peer is None:
            return self._unknown(node)
        return peer.ask(request)

    async def _ask_own(self, request: Request) -> Answer:
        answer = self._own(request)
        if crc32(answer.data) != answer.crc:
            raise TransferError(
                f"What this node itself holds of step {request.snapshot.step} has changed in memory (its CRC differs)."
            )
        return answer

    async def _unknown(self, node: str) -> Answer:
        raise Unreachable(f"Node {node} is not in the present world; do without it.")

    def close(self) -> None:
        """Close all connections."""
        self.update(self._node, {}, {})
