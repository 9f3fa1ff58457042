"""The tests' own network does what it says, so that what is tested on it means something."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.netlab import Lab, Wire, obstacle
from tests.unit.worlds import eventually

ECHO = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7))
print("listens", flush=True)
while True:
    connection, _ = listener.accept()
    while data := connection.recv(65536):
        connection.sendall(data)
"""

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "no obstacle")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("a", "b", "c", wires={"c": Wire(delay_ms=20, jitter_ms=2)}) as built:
        echoes = []
        for host in ("a", "c"):
            command = [*built.inside(host), sys.executable, "-c", ECHO, built.address(host)]
            echoes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            assert echoes[-1].stdout.readline() == b"listens\n"
        yield built
        for echo in echoes:
            echo.kill()
            echo.wait()


def connects(lab: Lab, source: str, target: str) -> bool:
    code = "import socket, sys; socket.create_connection((sys.argv[1], 7), 1.0)"
    command = [*lab.inside(source), sys.executable, "-c", code, lab.address(target)]
    return subprocess.run(command, capture_output=True, timeout=20).returncode == 0


def test_a_cut_host_reaches_nobody_until_it_is_healed(lab: Lab) -> None:
    assert connects(lab, "b", "a")
    lab.cut("b")
    assert not connects(lab, "b", "a") and not connects(lab, "a", "b")
    assert connects(lab, "c", "a")
    lab.heal("b")
    eventually(lambda: connects(lab, "b", "a"), "a healed cable carries")


def test_a_link_may_be_dead_between_two_that_reach_all_others(lab: Lab) -> None:
    for fault, mend in ((lab.part, lab.join), (lab.drop, lab.undrop)):
        fault("b", "a")
        assert not connects(lab, "b", "a")
        assert connects(lab, "b", "c") and connects(lab, "c", "a")
        mend("b", "a")
        eventually(lambda: connects(lab, "b", "a"), "a mended link carries")


def test_a_door_leads_into_the_lab_and_connections_can_be_reset(lab: Lab) -> None:
    port = lab.door("a", 7)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"hello")
        assert connection.recv(16) == b"hello"
        lab.reset("a", "a")
        assert connection.recv(16) == b""


def test_a_wire_delays_both_ways(lab: Lab) -> None:
    code = (
        "import socket, sys, time; s = socket.create_connection((sys.argv[1], 7), 5); t = time.monotonic(); "
        "s.sendall(b'x'); s.recv(1); print(time.monotonic() - t)"
    )
    command = [*lab.inside("b"), sys.executable, "-c", code, lab.address("c")]
    round_trip_s = float(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout)
    assert 0.04 <= round_trip_s < 0.5


def test_a_rate_is_kept(lab: Lab) -> None:
    lab.rate("b", "8mbit")
    code = (
        "import socket, sys, time; s = socket.create_connection((sys.argv[1], 7), 5); t = time.monotonic(); "
        "s.sendall(b'x' * 500000); n = 0\n"
        "while n < 500000: n += len(s.recv(65536))\n"
        "print(time.monotonic() - t)"
    )
    command = [*lab.inside("b"), sys.executable, "-c", code, lab.address("a")]
    taken_s = float(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)
    assert 0.3 < taken_s < 5.0


def test_nothing_is_left_of_a_lab() -> None:
    with Lab("x") as lab:
        name = lab.inside("x")[-1]
        assert name in namespaces()
    assert name not in namespaces()


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10, check=True).stdout
