"""How keepers talk: hostile frames, lost and damaged replies, peers that vanish. Real sockets on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from agent.keys import Keys, make_keys
from agent.shards import (
    CHUNK_BYTES,
    CREDITS,
    Answer,
    Kind,
    Peer,
    Request,
    ShardServer,
    Status,
    Traffic,
    parse_request,
)
from elastic.errors import ConfigError, TransferError, Unreachable
from elastic.snapshots import SnapshotId

SNAPSHOT = SnapshotId(3, 1)
CONTENT = bytes(range(256)) * 4096
DEADLINE_S = 20.0
FIXED_BYTES = len(Request(Kind.SHARD, SNAPSHOT).pack(1))
"""Of a request, without the name of who asks: what a reply echoes."""


def read(offset: int = 0, length: int = 1000) -> Request:
    return Request(Kind.SHARD, SNAPSHOT, 0, offset, length, "asker")


def content(request: Request) -> Answer:
    return Answer.of(Status.OK, CONTENT[request.offset : request.offset + request.length])


class Ends:
    """A server, and what asks it."""

    def __init__(self, answer: Callable[[Request], Answer], keys: Keys | None = None) -> None:
        self.context = zmq.Context()
        self.raw_context = zmq.asyncio.Context.shadow(self.context)
        self.served, self.asked = Traffic(), Traffic()
        self.server = ShardServer(self.context, "127.0.0.1", answer, self.served, keys)
        self.peers: list[Peer] = []

    def peer(self, address: str = "", silence_s: float = 0.3, keys: Keys | None = None, public_key: str = "") -> Peer:
        peer = Peer(
            self.context,
            "other",
            address or self.server.address,
            self.asked,
            silence_s=silence_s,
            keys=keys,
            public_key=public_key,
        )
        self.peers.append(peer)
        return peer

    def raw(self, kind: int = zmq.DEALER) -> zmq.asyncio.Socket:
        """A socket that sends whatever it is given."""
        made = self.raw_context.socket(kind)
        made.connect(self.server.address)
        return made


@asynccontextmanager
async def ends(answer: Callable[[Request], Answer] = content, keys: Keys | None = None) -> AsyncIterator[Ends]:
    made = Ends(answer, keys)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield made
    finally:
        for peer in made.peers:
            peer.close()
        made.server.close()
        made.context.destroy(0)


@given(
    st.builds(
        Request,
        st.sampled_from(Kind),
        st.builds(SnapshotId, st.integers(0, 1 << 40), st.integers(0, 1 << 40)),
        st.integers(0, 65535),
        st.integers(0, 1 << 60),
        st.integers(0, CHUNK_BYTES),
        st.text(max_size=40),
    ),
    st.integers(0, (1 << 64) - 1),
)
def test_a_request_comes_out_as_it_went_in(request: Request, number: int) -> None:
    assert parse_request(request.pack(number)) == (number, request)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_request_or_none(frame: bytes) -> None:
    parse_request(frame)
    parse_request(read().pack(1)[:20] + frame)


def test_bytes_arrive_as_they_are_in_memory() -> None:
    async def scenario() -> None:
        async with ends() as both:
            answer = await both.peer().ask(read(77, CHUNK_BYTES - 77))
            assert bytes(answer.data) == CONTENT[77:]
            assert both.served.sent_bytes == both.asked.received_bytes == CHUNK_BYTES - 77

    asyncio.run(scenario())


def test_hostile_frames_are_counted_and_the_server_goes_on() -> None:
    good = read().pack(1)
    hostile = [
        [b""],
        [good, b"more"],
        [good[:-10]],
        [b"elk0" + good[4:]],
        [b"elk1\xff" + good[5:]],
        [good[: FIXED_BYTES - 4] + struct.pack("!I", CHUNK_BYTES + 1) + b"asker"],
        [good + b"\xff\xfe"],
        [os.urandom(60)],
        [b"\x80\x04\x95" + bytes(40)],
    ]

    async def scenario() -> None:
        async with ends() as both:
            raw = both.raw()
            for frames in hostile:
                await raw.send_multipart(frames)
            answer = await both.peer().ask(read())
            assert bytes(answer.data) == CONTENT[:1000]
            while both.served.refused < len(hostile):
                await raw.send_multipart([b"one more"])
                await both.peer().ask(read())
            raw.close(0)

    asyncio.run(scenario())


def test_an_oversized_frame_costs_its_sender_the_connection() -> None:
    async def scenario() -> None:
        async with ends() as both:
            raw = both.raw()
            monitor = raw.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            await raw.send(bytes(CHUNK_BYTES))
            await monitor.recv_multipart()
            assert bytes((await both.peer().ask(read())).data) == CONTENT[:1000]
            raw.disable_monitor()
            monitor.close(0)
            raw.close(0)

    asyncio.run(scenario())


def test_what_is_no_zeromq_at_all_does_no_harm() -> None:
    async def scenario() -> None:
        async with ends() as both:
            host, port = both.server.address.removeprefix("tcp://").split(":")
            for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(5000), os.urandom(5000)):
                with socket.create_connection((host, int(port)), timeout=5) as line:
                    line.sendall(junk)
            assert bytes((await both.peer().ask(read())).data) == CONTENT[:1000]

    asyncio.run(scenario())


def test_a_refusal_comes_back_with_its_reason() -> None:
    async def scenario() -> None:
        async with ends(lambda _: Answer.of(Status.GONE, b"it is gone")) as both:
            answer = await both.peer().ask(read())
            assert (answer.status, bytes(answer.data)) == (Status.GONE, b"it is gone")

    asyncio.run(scenario())


def test_a_damaged_reply_is_asked_for_once_more() -> None:
    answers = iter([Answer(Status.OK, b"x", 1), content(read())])

    async def scenario() -> None:
        async with ends(lambda _: next(answers)) as both:
            assert bytes((await both.peer().ask(read())).data) == CONTENT[:1000]
            assert (both.asked.damaged, both.asked.retries) == (1, 1)

    asyncio.run(scenario())


def test_what_stays_damaged_is_an_error_of_that_peer() -> None:
    async def scenario() -> None:
        async with ends(lambda _: Answer(Status.OK, b"x", 1)) as both:
            with pytest.raises(TransferError, match="What other sent for step 3 is damaged"):
                await both.peer().ask(read())

    asyncio.run(scenario())


def test_a_peer_that_is_gone_is_known_at_once_and_one_that_is_silent_after_its_time() -> None:
    async def scenario() -> None:
        async with ends() as both:
            with socket.socket() as silent, socket.socket() as closed:
                for end in (silent, closed):
                    end.bind(("127.0.0.1", 0))
                silent.listen()
                loop = asyncio.get_running_loop()
                for end, least_s in ((closed, 0.0), (silent, 0.5)):
                    began_s = loop.time()
                    with pytest.raises(Unreachable, match="does not answer"):
                        await both.peer(f"tcp://127.0.0.1:{end.getsockname()[1]}").ask(read())
                    assert loop.time() - began_s >= least_s

    asyncio.run(scenario())


def test_replies_to_nothing_that_was_asked_are_dropped() -> None:
    async def scenario() -> None:
        async with ends() as both:
            router = both.raw_context.socket(zmq.ROUTER)
            router.bind("tcp://127.0.0.1:0")
            asking = asyncio.create_task(both.peer(router.getsockopt_string(zmq.LAST_ENDPOINT), 5.0).ask(read()))
            identity, frame = await router.recv_multipart()
            header = struct.pack("!4sBI", b"elk1", 0, 0)
            echo = frame[:FIXED_BYTES]
            for frames in (
                [header + read().pack(99)[:FIXED_BYTES], b""],
                [header + echo[:-1] + b"\0", b""],
                [b"elk0" + header[4:] + echo, b""],
                [header[:4] + b"\x09" + header[5:] + echo, b""],
                [header, b""],
                [b"", b"", b""],
                [header + echo, b""],
            ):
                await router.send_multipart([identity, *frames])
            assert (await asking).data == b""
            assert (both.asked.stale, both.asked.refused) == (2, 4)
            router.close(0)

    asyncio.run(scenario())


def test_no_more_than_the_credits_are_outstanding() -> None:
    async def scenario() -> None:
        async with ends() as both:
            router = both.raw_context.socket(zmq.ROUTER)
            router.bind("tcp://127.0.0.1:0")
            peer = both.peer(router.getsockopt_string(zmq.LAST_ENDPOINT), 5.0)
            asking = [asyncio.create_task(peer.ask(read(i, 1))) for i in range(3 * CREDITS)]
            answered = 0
            waiting: list[list[bytes]] = []
            while answered < len(asking):
                while len(waiting) < min(CREDITS, len(asking) - answered):
                    waiting.append(await router.recv_multipart())
                assert not await router.poll(20), "one more was sent than there is credit for"
                identity, frame = waiting.pop()
                await router.send_multipart([identity, struct.pack("!4sBI", b"elk1", 0, 0) + frame[:FIXED_BYTES], b""])
                answered += 1
            await asyncio.gather(*asking)
            router.close(0)

    asyncio.run(scenario())


def test_a_connection_that_breaks_costs_a_question_more() -> None:
    """A relay between the two closes the first connection after the request has passed."""

    async def scenario() -> None:
        async with ends() as both:
            host, port = both.server.address.removeprefix("tcp://").split(":")
            cuts = 0

            async def relay(near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
                nonlocal cuts
                far_in, far_out = await asyncio.open_connection(host, int(port))

                async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, limit: int) -> None:
                    passed = 0
                    while (data := await source.read(65536)) and passed <= limit:
                        passed += len(data)
                        target.write(data)
                    near_out.close()
                    far_out.close()

                cuts += 1
                limit = 200_000 if cuts == 1 else 1 << 40
                await asyncio.gather(pump(near_in, far_out, limit), pump(far_in, near_out, limit))

            server = await asyncio.start_server(relay, "127.0.0.1", 0)
            peer = both.peer(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", 5.0)
            assert bytes((await peer.ask(read(0, CHUNK_BYTES))).data) == CONTENT
            assert cuts == 2 and both.asked.retries == 1
            server.close()

    asyncio.run(scenario())


def test_a_key_that_is_not_allowed_gets_nothing() -> None:
    async def scenario() -> None:
        pairs = [make_keys() for _ in range(3)]
        async with ends(keys=pairs[0]) as both:
            both.server.allowed = frozenset([pairs[1].public])
            allowed = both.peer(keys=pairs[1], public_key=pairs[0].public)
            assert bytes((await allowed.ask(read())).data) == CONTENT[:1000]
            for stranger in (
                both.peer(keys=pairs[2], public_key=pairs[0].public),
                both.peer(keys=pairs[1], public_key=pairs[2].public),
                both.peer(),
            ):
                with pytest.raises(Unreachable):
                    await stranger.ask(read())

    asyncio.run(scenario())


def test_an_address_of_another_machine_is_refused_in_words() -> None:
    async def scenario() -> None:
        context = zmq.Context()
        with pytest.raises(ConfigError, match=r"The keeper cannot listen at 203.0.113.1"):
            ShardServer(context, "203.0.113.1", content, Traffic())
        context.destroy(0)

    asyncio.run(scenario())


def test_a_stopped_server_is_silent_and_one_that_goes_on_is_believed_again() -> None:
    script = (
        "import asyncio, zmq\n"
        "from tests.unit.test_shards import *\n"
        "async def main():\n"
        "    server = ShardServer(zmq.Context(), '127.0.0.1', content, Traffic())\n"
        "    print(server.address, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()

            async def scenario() -> None:
                async with ends() as both:
                    peer = both.peer(address)
                    await peer.ask(read())
                    os.kill(process.pid, signal.SIGSTOP)
                    with pytest.raises(Unreachable):
                        await peer.ask(read())
                    os.kill(process.pid, signal.SIGCONT)
                    assert bytes((await peer.ask(read())).data) == CONTENT[:1000]

            asyncio.run(scenario())
        finally:
            process.kill()


def test_the_transport_needs_no_torch() -> None:
    script = "import sys, agent.keeping, agent.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
