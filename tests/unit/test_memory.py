"""Snapshot memory: the agent owns it, the worker fills it, and only what is whole is ever read back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checksum import crc32
from elastic.errors import ConfigError, ProtocolError, TransferError, Unreachable
from elastic.memory import (
    BUFFERS_MAX,
    AskRoom,
    AskSlice,
    Filled,
    Found,
    Granted,
    Refused,
    SnapshotMemory,
    SnapshotPage,
    StoredSlice,
    pack,
    unpack,
)
from elastic.snapshots import Slice, SnapshotId, aligned, is_spent, numbers_of, slice_of
from tests.unit.nodes import DEADLINE_S, Node, node
from tests.unit.worlds import eventually, open_files

ROOT = Path(__file__).parents[2]
MIB = 2**20
DESCRIPTION = b"what it is"


def make_slice(payload: bytes, step: int = 5, generation: int = 2, index: int = 0, count: int = 1) -> Slice:
    size_bytes = len(payload)
    return Slice(
        SnapshotId(step, generation),
        index,
        count,
        begin=index * size_bytes,
        end=(index + 1) * size_bytes,
        total_bytes=count * size_bytes,
        description_bytes=len(DESCRIPTION),
        description_crc=crc32(DESCRIPTION),
    )


def write(link: SnapshotMemory, buffer: int, payload: bytes, buffers: int = 3, **which: int) -> Slice:
    """Fill a buffer as a worker does."""
    piece = make_slice(payload, **which)
    memory = link.room(buffer, piece.stored_bytes, buffers)
    assert memory is not None and link.page is not None
    link.page.begin(buffer)
    memory[: len(payload)] = payload
    memory[piece.description_at : piece.stored_bytes] = DESCRIPTION
    link.page.filled(buffer, piece)
    return piece


def read(stored: StoredSlice) -> bytes:
    payload = memoryview(bytearray(stored.slice.end - stored.slice.begin))
    stored.read(0, payload)
    assert stored.description() == DESCRIPTION
    stored.close()
    return bytes(payload)


def flip(place: Node, worker: str, offset: int, buffer: int = 0) -> None:
    """Change one bit in the agent's memory behind everybody's back."""
    (fd,) = [held.fd for held in place.do(lambda s: s.held()) if (held.worker, held.buffer) == (worker, buffer)]
    (byte,) = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes([byte ^ 16]), offset)


# ----------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def page() -> SnapshotPage:
    fd = SnapshotPage.create("test")
    try:
        return SnapshotPage(fd)
    finally:
        os.close(fd)


slices = st.builds(
    lambda step, generation, index, more, begin, size, rest, numbers: Slice(
        SnapshotId(step, generation), index, index + more, begin, begin + size, begin + size + rest, *numbers
    ),
    *[st.integers(0, 2**40)] * 3,
    st.integers(1, 2**20),
    *[st.integers(0, 2**45)] * 3,
    st.tuples(st.integers(0, 2**27), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)


@given(st.lists(st.tuples(st.integers(0, BUFFERS_MAX - 1), st.none() | slices), max_size=8))
def test_a_page_shows_what_was_filled_last_and_not_written_since(acts: list[tuple[int, Slice | None]]) -> None:
    fd = SnapshotPage.create("test")
    writer, reader = SnapshotPage(fd), SnapshotPage(fd)
    os.close(fd)
    turns, expected = [0] * BUFFERS_MAX, {}
    for buffer, piece in acts:
        writer.begin(buffer)
        expected.pop(buffer, None)
        if piece is not None:
            writer.filled(buffer, piece)
            turns[buffer] += 1
            expected[buffer] = Filled(buffer, turns[buffer], piece)
    assert reader.slices() == [expected[buffer] for buffer in sorted(expected)]
    assert (reader.stable, reader.protected) == (-1, None)
    writer.stable, reader.protected = 7, SnapshotId(6, 2)
    assert (reader.stable, writer.protected) == (7, SnapshotId(6, 2))


@pytest.mark.parametrize("word", range(1, 13))
def test_a_bit_that_flips_on_the_page_makes_the_slice_unknown(page: SnapshotPage, word: int) -> None:
    page.begin(1)
    page.filled(1, make_slice(b"payload"))
    assert len(page.slices()) == 1
    page._words[8 + 16 + word] ^= 1 << 3
    assert page.slices() == []


def test_a_reader_never_sees_half_of_two_records(page: SnapshotPage) -> None:
    pieces = [make_slice(bytes(size), step=size, index=size, count=size + 1) for size in (3, 40)]
    stop = threading.Event()

    def write_on() -> None:
        while not stop.is_set():
            for piece in pieces:
                page.begin(0)
                page.filled(0, piece)

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        seen = [filled.slice for _ in range(5000) for filled in page.slices()]
    finally:
        stop.set()
        writer.join(DEADLINE_S)
    assert set(seen) <= set(pieces)
    assert page.slices()[0].slice == pieces[1]


@given(slices)
def test_slices_and_messages_come_back_as_they_were(piece: Slice) -> None:
    numbers = list(numbers_of(piece))
    assert slice_of(numbers) == piece
    for message in (
        AskRoom("n/w", 1, 2, 3),
        AskSlice(1, 2, 3),
        Granted(0),
        Found(numbers),
        Refused("ConfigError", "é"),
    ):
        assert unpack(pack(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"{}", b"\xff", b"[" * 9000, b'{"Nothing": {}}', b'{"AskRoom": {}}', b'{"AskSlice": 3}'),
        b'{"AskSlice": {"step": 1, "generation": 1, "index": "0"}}',
    ],
)
def test_a_malformed_message_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="about snapshot memory"):
        unpack(data)


@pytest.mark.parametrize("numbers", [None, [], [1] * 9, [1, 1, 2, 2, 0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 2, 1, 3, 0, 0, 0]])
def test_numbers_that_no_slice_has_are_refused(numbers: object) -> None:
    with pytest.raises(ValueError):
        slice_of(numbers)


@given(st.integers(0, 9), st.integers(0, 3), st.integers(0, 3), st.integers(-1, 9))
def test_the_stable_snapshot_is_never_spent(step: int, its: int, generation: int, stable: int) -> None:
    spent = is_spent(SnapshotId(step, its), generation, stable)
    assert not (spent and step == stable)
    assert spent == (step < stable) or (step > stable and its != generation)


# ----------------------------------------------------------------------------------------------------
# The service


def test_what_a_worker_fills_is_held_checked_and_read_back(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        link, payload = place.link("w0"), os.urandom(100_003)
        piece = write(link, 0, payload)
        (held,) = place.do(lambda s: s.held())
        assert (held.worker, held.buffer, held.slice) == ("w0", 0, piece)
        place.run(place.service.check())
        (held,) = place.do(lambda s: s.held())
        assert held.slice == replace(piece, payload_crc=crc32(payload))
        stored = link.slice(piece.snapshot, 0)
        assert stored.slice == held.slice and read(stored) == payload
        place.do(lambda s: s.show_protected(SnapshotId(5, 1)))
        assert link.page is not None and link.page.protected == SnapshotId(5, 1)
        link.page.stable = 4
        assert place.do(lambda s: s.stable) == 4
        link.page.begin(0)
        assert place.do(lambda s: s.held()) == []
        link.close()


def test_a_slice_that_nobody_has_checked_yet_is_checked_when_it_is_asked_for(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        link = place.link("w0")
        piece = write(link, 2, b"payload" * 1000)
        assert link.slice(piece.snapshot, 0).slice.payload_crc == crc32(b"payload" * 1000)


def test_a_buffer_grows_and_keeps_what_it_holds(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        link = place.link("w0")
        piece = write(link, 0, b"a" * 5000)
        memory = link.room(0, 3 * MIB, 1)
        assert memory is not None and len(memory) == 3 * MIB and memory[:5000] == b"a" * 5000
        assert read(link.slice(piece.snapshot, 0)) == b"a" * 5000
        assert place.do(lambda s: s.used_bytes) == 3 * MIB
        smaller = link.room(0, 100, 1)
        assert smaller is not None and len(smaller) == 3 * MIB


def test_the_budget_is_never_exceeded_and_the_refusal_says_what_is_needed(tmp_path: Path) -> None:
    with node(tmp_path, 10 * MIB) as place:
        first, second = place.link("w0"), place.link("w1")
        assert first.room(0, 2 * MIB, 3) is not None
        with pytest.raises(
            ConfigError, match=r"worker w1 need 6 MiB .* have 6 MiB of the 10 MiB that --snapshot-memory"
        ):
            second.room(0, 2 * MIB, 3)
        with pytest.raises(ConfigError, match="set it to 12 MiB or more"):
            second.room(0, 2 * MIB, 3)
        assert second.room(0, 2 * MIB, 2) is not None
        assert place.do(lambda s: s.used_bytes) == 4 * MIB
        with pytest.raises(ConfigError):
            first.room(0, 2 * MIB + 1, 3)


def test_nobody_waits_for_the_pages_of_a_large_buffer(tmp_path: Path) -> None:
    with node(tmp_path, allocation_wait_s=0) as place:
        link = place.link("w0")
        assert link.room(0, 40 * MIB, 1) is None
        assert place.do(lambda s: s.used_bytes) == 40 * MIB
        eventually(lambda: link.room(0, 40 * MIB, 1) is not None, "the pages are there")


def test_slices_of_dead_workers_are_in_the_way_only_for_a_while(tmp_path: Path) -> None:
    with node(tmp_path, 2 * MIB) as place:
        dead = place.link("w0")
        for buffer, step in enumerate((4, 5)):
            write(dead, buffer, b"x" * (MIB - 100), 2, step=step)
        place.do(lambda s: s.worker_gone("w0"))
        heir = place.link("w1")
        assert heir.room(0, MIB, 2) is None
        place.do(lambda s: s.forget_before(5))
        assert heir.room(0, MIB, 2) is not None
        assert heir.room(1, MIB, 2) is None
        assert place.do(lambda s: s.used_bytes) == 2 * MIB
        place.do(lambda s: s.forget_before(6))
        assert heir.room(1, MIB, 2) is not None


def test_of_a_dead_worker_the_filled_buffers_stay_until_they_are_forgotten(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        link = place.link("w0")
        pieces = [write(link, buffer, os.urandom(3000), step=buffer + 5) for buffer in range(3)]
        assert link.page is not None
        link.page.begin(2)
        place.do(lambda s: s.worker_gone("w0"))
        assert [held.slice for held in place.do(lambda s: s.held())] == pieces[:2]
        with pytest.raises(ProtocolError, match="no worker of this agent"):
            link.slice(pieces[0].snapshot, 0)
        other = place.link("w1")
        assert other.slice(pieces[1].snapshot, 0).slice.end == 3000
        place.do(lambda s: s.forget_before(6))
        assert [held.slice.snapshot.step for held in place.do(lambda s: s.held())] == [6]
        place.do(lambda s: s.forget_before(5, generation=3, but=pieces[1].snapshot))
        assert [held.slice.snapshot for held in place.do(lambda s: s.held())] == [pieces[1].snapshot]
        place.do(lambda s: s.forget_before(5, generation=3))
        assert place.do(lambda s: (s.held(), s.used_bytes)) == ([], 0)
        with pytest.raises(TransferError, match="does not hold slice 0 of the snapshot of step 6"):
            other.slice(pieces[1].snapshot, 0)


def test_a_job_that_goes_back_makes_nothing_newer_stable(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        link = place.link("w0")
        write(link, 0, b"payload")
        assert link.page is not None
        link.page.stable = 18
        place.do(lambda s: s.go_back(20))
        assert place.do(lambda s: s.stable) == 18
        place.do(lambda s: s.go_back(5))
        assert place.do(lambda s: s.stable) == 5


def test_living_workers_slices_are_never_forgotten(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        piece = write(place.link("w0"), 0, b"payload")
        place.do(lambda s: s.forget_before(100, 9))
        assert [held.slice for held in place.do(lambda s: s.held())] == [piece]


WORKER = """
import sys, time
from elastic.memory import SnapshotMemory
from tests.unit.test_memory import write
sys.stdin.readline()
link = SnapshotMemory(sys.argv[1], "w0")
write(link, 0, b"last words" * 1000)
link.page.begin(1)
print("written", flush=True)
time.sleep(100)
"""


def test_what_a_killed_process_has_filled_is_read_by_others(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(place.path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert worker.stdin is not None and worker.stdout is not None
            place.do(lambda s: s.expect("w0", worker.pid))
            worker.stdin.write("go\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == "written\n"
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.communicate(timeout=DEADLINE_S)
        place.do(lambda s: s.worker_gone("w0"))
        assert read(place.link("w1").slice(SnapshotId(5, 2), 0)) == b"last words" * 1000


@pytest.mark.parametrize("where", ["payload", "description"])
def test_a_bit_that_flips_makes_a_slice_count_as_lost(tmp_path: Path, where: str) -> None:
    with node(tmp_path) as place:
        link = place.link("w0")
        piece = write(link, 0, b"payload" * 1000)
        whole = write(link, 1, b"another", step=6)
        place.run(place.service.check())
        flip(place, "w0", 100 if where == "payload" else piece.description_at)
        assert len(place.do(lambda s: s.held())) == 2
        place.run(place.service.check())  # what is known is not read again,
        assert len(place.do(lambda s: s.held())) == 2
        place.run(place.service.check(again=True))  # unless that is asked for.
        assert [held.slice.snapshot for held in place.do(lambda s: s.held())] == [whole.snapshot]
        with pytest.raises(TransferError, match="no longer undamaged"):
            link.slice(piece.snapshot, 0)
        write(link, 0, b"payload" * 1000)  # The same again, in another turn, is another slice.
        assert len(place.do(lambda s: s.held())) == 2


def test_a_description_that_was_damaged_before_the_first_look_is_found(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        link = place.link("w0")
        piece = write(link, 0, b"payload")
        flip(place, "w0", piece.description_at + 3)
        with pytest.raises(TransferError, match="no longer undamaged"):
            link.slice(piece.snapshot, 0)


def test_a_slice_that_was_assembled_elsewhere_is_handed_out_until_it_is_dropped(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        link, payload = place.link("w0"), os.urandom(4000)
        piece = replace(make_slice(payload, index=1, count=2), payload_crc=crc32(payload))

        def adopt(size_bytes: int) -> None:
            fd = os.memfd_create("assembled")
            os.write(fd, payload.ljust(aligned(len(payload)), b"\0") + DESCRIPTION)
            os.ftruncate(fd, size_bytes)
            place.do(lambda s: s.adopt(piece, fd))

        with pytest.raises(TransferError, match="cannot hold"):
            adopt(piece.stored_bytes - 1)
        adopt(piece.stored_bytes)
        assert place.do(lambda s: ([one.slice for one in s.held()], s.used_bytes)) == ([piece], 0)
        assert read(link.slice(piece.snapshot, 1)) == payload
        place.do(lambda s: s.drop_adopted())
        with pytest.raises(TransferError):
            link.slice(piece.snapshot, 1)


def test_only_the_process_that_the_agent_named_is_served(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        stranger = place.link("w0", pid=1)
        with pytest.raises(ProtocolError, match=f"Process {os.getpid()} is no worker of this agent"):
            stranger.room(0, 100, 1)
        place.do(lambda s: s.expect("w1", os.getpid()))
        with pytest.raises(ProtocolError, match="asks for room as worker w0"):
            stranger.room(0, 100, 1)
        own = place.link("w1")
        for buffer, size_bytes, buffers in ((3, 1, 3), (0, 1, 4), (0, 0, 1), (-1, 1, 1)):
            with pytest.raises(ProtocolError, match="room that cannot be"):
                own.room(buffer, size_bytes, buffers)


def test_a_worker_that_talks_nonsense_is_told_so_and_goes_on(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        link = place.link("w0")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
            channel.settimeout(DEADLINE_S)
            channel.connect(str(place.path))
            for nonsense in (b"\0", pack(Granted(3))):
                channel.send(nonsense)
                answer = unpack(channel.recv(4096))
                assert isinstance(answer, Refused) and answer.error == "ProtocolError"
        assert link.room(0, 100, 1) is not None


def test_no_call_waits_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "memory.sock"
    link = SnapshotMemory(path, "w0", timeout_s=0.05)
    with pytest.raises(Unreachable, match="did not answer about snapshot memory within"):
        link.room(0, 100, 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(Unreachable, match="timed out"):
            link.slice(SnapshotId(1, 1), 0)
        accepted, _ = listener.accept()
        accepted.close()
        asked: list[object] = []

        def hang_up() -> None:
            again, _ = listener.accept()
            asked.append(again.recv(4096))
            again.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        patient = SnapshotMemory(path, "w0", DEADLINE_S)
        with pytest.raises(Unreachable, match=r"hung up|reset"):
            patient.room(0, 100, 1)
        thread.join(DEADLINE_S)
        assert asked


def test_fifty_incarnations_leave_no_file_open(tmp_path: Path) -> None:
    with node(tmp_path) as place:

        def live_and_die(number: int) -> None:
            link = place.link(f"w{number}")
            for buffer in range(2):
                write(link, buffer, bytes(5000), step=number)
            place.run(place.service.check())
            read(link.slice(SnapshotId(number, 2), 0))
            with pytest.raises(TransferError):
                link.slice(SnapshotId(number, 1), 0)
            if number % 2 and link.page is not None:
                link.page.begin(1)
            link.close()
            place.do(lambda s: s.worker_gone(f"w{number}"))
            place.do(lambda s: s.forget_before(number))

        for number in range(4):
            live_and_die(number)
        place.do(lambda s: s.forget_before(1000))
        before = open_files()
        for number in range(4, 54):
            live_and_die(number)
        place.do(lambda s: s.forget_before(1000))
        eventually(lambda: open_files() <= before, "all files are closed")
        assert place.do(lambda s: s.used_bytes) == 0


def test_closing_gives_everything_back(tmp_path: Path) -> None:
    before = open_files()
    with node(tmp_path) as place:
        link = place.link("w0")
        write(link, 0, b"payload")
        assert link.page is not None
        link.page.close()
        link.close()
    eventually(lambda: open_files() <= before, "all files are closed")
    assert not place.path.exists()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_what_is_held_is_what_was_filled(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any order of filling, dying and forgetting, against a plain dictionary."""
    with node(tmp_path_factory.mktemp("node")) as place:
        links, model, dead = {}, {}, set()
        for step in range(1, 9):
            act = data.draw(st.sampled_from(["fill", "fill", "die", "forget"]))
            name = f"w{data.draw(st.integers(0, 2))}"
            buffer = data.draw(st.integers(0, 2))
            if act == "fill" and name not in dead:
                link = links.setdefault(name, place.link(name))
                payload = bytes([step]) * data.draw(st.integers(0, 9000))
                model[name, buffer] = write(link, buffer, payload, step=step)
            elif act == "die":
                place.do(lambda s, name=name: s.worker_gone(name))
                dead.add(name)
            elif act == "forget":
                place.do(lambda s, step=step: s.forget_before(step - 2))
                model = {k: v for k, v in model.items() if k[0] not in dead or v.snapshot.step >= step - 2}
            held = {(h.worker, h.buffer): h.slice for h in place.do(lambda s: s.held())}
            assert held == model
        for link in links.values():
            link.close()
