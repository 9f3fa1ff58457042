"""Transcripts of the agent's machine: what happens on a node, what must be done."""

from __future__ import annotations

import signal

import pytest

from agent.events import (
    AgentEffect,
    AgentEvent,
    CarriedOut,
    CarryOut,
    Connected,
    Disconnected,
    DropConnection,
    EndAgent,
    EndAsked,
    Fork,
    Forked,
    ForkFailed,
    Forward,
    Heard,
    Looked,
    OpenGeneration,
    ProcessEnded,
    Report,
    Signal,
    Tick,
    WorkerSaid,
)
from agent.machine import AgentMachine, AgentSettings, describe_exit
from elastic.domain import (
    AgentHello,
    CollectEvidence,
    CollectiveFailed,
    Commit,
    Failed,
    FromWorker,
    Goodbye,
    Heartbeat,
    KillWorker,
    Leaving,
    Peer,
    PeersProbed,
    Plan,
    Prepare,
    Prepared,
    ProbePeers,
    Refused,
    Registered,
    Shutdown,
    StartWorker,
    Suspected,
    Switched,
    ToWorker,
    Welcome,
    WorkerExited,
    WorkerStarted,
    WorkerStatus,
)
from elastic.progress import Operation

HELLO = AgentHello(job="j", node="n", incarnation="n#1", nproc=2)
FIRST = StartWorker("n/0.1", 0)
SECOND = StartWorker("n/0.2", 0)
KILL = signal.SIGKILL
TERM = signal.SIGTERM


class Node:
    """An agent's machine with a clock that only moves when told."""

    def __init__(self, *, attached: bool = True, **settings: float) -> None:
        self.machine = AgentMachine(AgentSettings(HELLO, **settings))
        self.now = 0.0
        if attached:
            self.feed(Connected(), Heard(Welcome()))

    def feed(self, *events: AgentEvent, at: float | None = None) -> list[AgentEffect]:
        """Effects of the last event."""
        self.now = self.now if at is None else at
        effects: list[AgentEffect] = []
        for event in events:
            effects = self.machine.step(event, self.now)
        return effects

    def with_worker(self) -> Node:
        """Start n/0.1."""
        self.feed(Heard(FIRST), Forked("n/0.1", 7))
        return self


def looked(
    state: str,
    committed: int = 0,
    progress: int = 0,
    *,
    busy_until_s: float = 0.0,
    waits: bool = False,
    operation: Operation | None = None,
) -> Looked:
    return Looked("n/0.1", state, 1, committed, progress, 0.5, 2 * committed, busy_until_s, waits, operation=operation)


def exited(
    code: int,
    reason: str,
    *,
    blameless: bool,
    by: str = "pidfd",
    worker: str = "n/0.1",
    silent_s: float = 0.0,
) -> Report:
    return Report(WorkerExited(worker, code, reason, blameless, by, silent_s))


def test_hello_comes_first_and_what_follows_does_not_wait_for_the_welcome() -> None:
    node = Node(attached=False)
    assert node.feed(WorkerSaid("n/0.1", Registered())) == [], "nobody to tell, and no such worker"
    assert node.feed(Connected()) == [Report(HELLO)]
    assert node.feed(Heard(FIRST)) == [Fork(FIRST)]
    assert node.feed(Forked("n/0.1", 7)) == [Report(WorkerStarted("n/0.1", 0, 7))]
    assert node.feed(WorkerSaid("n/0.1", Registered())) == [Report(FromWorker("n/0.1", Registered()))]


def test_a_returning_controller_is_told_what_it_may_have_missed() -> None:
    node = Node().with_worker()
    node.feed(Disconnected("reset"))
    said = (Registered(), CollectiveFailed(1, 4, "reset"), Leaving(5, "d", 10))
    for message in (*said, Prepared(2), CollectiveFailed(1, 4, "reset")):
        assert node.feed(WorkerSaid("n/0.1", message)) == []
    node.feed(looked("S", committed=5))
    (hello,) = node.feed(Connected())
    assert isinstance(hello, Report) and isinstance(hello.message, AgentHello)
    assert hello.message.workers == (WorkerStatus("n/0.1", 0, 7, 1, 5, 0, 0.5, 10, messages=said),)


def test_a_broken_collective_is_not_told_again_once_its_world_is_left() -> None:
    node = Node().with_worker()
    node.feed(WorkerSaid("n/0.1", CollectiveFailed(1, 4, "reset")), WorkerSaid("n/0.1", Switched(2, 4)))
    node.feed(Disconnected("reset"))
    (hello,) = node.feed(Connected())
    assert isinstance(hello, Report) and isinstance(hello.message, AgentHello)
    assert hello.message.workers[0].messages == ()


def test_what_the_controller_does_not_keep_is_killed_and_not_reported() -> None:
    node = Node().with_worker()
    node.feed(Disconnected("reset"), Connected())
    assert node.feed(Heard(Welcome(keep=()))) == [Signal("n/0.1", KILL, "the job went on without it")]
    assert node.feed(ProcessEnded("n/0.1", -9)) == []
    node = Node().with_worker()
    node.feed(Disconnected("reset"), Connected())
    assert node.feed(Heard(Welcome(keep=("n/0.1",)))) == []


def test_a_place_is_filled_only_when_the_process_before_has_ended() -> None:
    node = Node().with_worker()
    assert node.feed(Heard(KillWorker("n/0.1", "fenced"))) == [Signal("n/0.1", KILL, "fenced")]
    assert node.feed(Heard(SECOND)) == []
    assert node.feed(ProcessEnded("n/0.1", -9)) == [exited(-9, "fenced", blameless=True), Fork(SECOND)]
    assert node.feed(Heard(StartWorker("n/1.1", 1))) == [Fork(StartWorker("n/1.1", 1))]


def test_a_worker_that_waits_for_its_place_can_be_killed() -> None:
    node = Node().with_worker()
    node.feed(Heard(SECOND))
    assert node.feed(Heard(KillWorker("n/0.2", "drained"))) == [
        exited(-9, "drained", blameless=True, by="never started", worker="n/0.2")
    ]
    assert node.feed(ProcessEnded("n/0.1", -9)) == [exited(-9, "killed by SIGKILL", blameless=True)]


def test_a_worker_that_is_killed_before_it_exists_dies_as_soon_as_it_does() -> None:
    node = Node()
    assert node.feed(Heard(FIRST), Heard(KillWorker("n/0.1", "fenced"))) == []
    assert node.feed(Forked("n/0.1", 7)) == [
        Report(WorkerStarted("n/0.1", 0, 7)),
        Signal("n/0.1", KILL, "fenced"),
    ]


def test_a_start_said_twice_starts_one_process() -> None:
    node = Node().with_worker()
    assert node.feed(Heard(FIRST)) == []


def test_a_failed_fork_is_reported_and_frees_the_place() -> None:
    node = Node()
    node.feed(Heard(FIRST), Heard(SECOND))
    assert node.feed(ForkFailed("n/0.1", "no memory")) == [
        exited(1, "it could not be started: no memory", blameless=False, by="fork server"),
        Fork(SECOND),
    ]


@pytest.mark.parametrize(
    ("code", "blameless", "words"),
    [
        (0, False, "exited with code 0"),
        (1, False, "exited with code 1"),
        (-9, True, "killed by SIGKILL"),
        (-15, True, "killed by SIGTERM"),
        (-11, False, "killed by SIGSEGV"),
        (-99, False, "killed by signal 99"),
    ],
)
def test_signals_from_outside_are_nobodys_fault(code: int, blameless: bool, words: str) -> None:
    assert describe_exit(code) == words
    assert Node().with_worker().feed(ProcessEnded("n/0.1", code)) == [exited(code, words, blameless=blameless)]


def test_a_worker_that_stands_still_is_believed_lost_after_the_failure_timeout() -> None:
    node = Node().with_worker()
    assert node.feed(looked("T"), at=1.0) == []
    assert node.feed(looked("S"), at=2.0) == []
    assert node.feed(looked("T"), at=2.5) == []
    assert node.feed(looked("T"), at=3.4) == []
    suspected = Report(Suspected("n/0.1", "stopped for 1.0 s", "process state"))
    assert node.feed(looked("T"), at=3.5) == [suspected], "there is a second left to look at everybody"
    assert node.feed(looked("T"), at=4.4) == [], "it is said once"
    assert node.feed(looked("T"), at=4.5) == [
        Signal("n/0.1", KILL, "stopped for 2.0 s"),
        exited(-9, "stopped for 2.0 s", blameless=True, by="process state", silent_s=2.0),
    ]
    assert node.feed(looked("T"), at=4.6) == []
    assert node.feed(ProcessEnded("n/0.1", -9)) == [], "said already"


def test_generations_open_the_store_once() -> None:
    node = Node().with_worker()
    order = ToWorker("n/0.1", Prepare(Plan(generation=4)))
    assert node.feed(Heard(order)) == [OpenGeneration(4), Forward("n/0.1", order.command)]
    assert node.feed(Heard(order)) == [Forward("n/0.1", order.command)]
    assert node.feed(Heard(ToWorker("n/0.1", Commit(4)))) == [Forward("n/0.1", Commit(4))]
    node.feed(Disconnected("reset"))
    (hello,) = node.feed(Connected())
    assert isinstance(hello, Report) and isinstance(hello.message, AgentHello)
    assert hello.message.highest_generation == 4


def test_the_dead_and_the_condemned_are_told_nothing() -> None:
    node = Node().with_worker()
    node.feed(Heard(KillWorker("n/0.1", "fenced")))
    assert node.feed(Heard(ToWorker("n/0.1", Commit(1)))) == []
    node.feed(ProcessEnded("n/0.1", -9))
    assert node.feed(Heard(ToWorker("n/0.1", Commit(1)))) == []
    assert node.feed(WorkerSaid("n/0.1", Failed())) == []


def test_a_shutdown_ends_workers_then_the_agent() -> None:
    node = Node().with_worker()
    assert node.feed(Heard(Shutdown("over", 3)), at=10.0) == [Signal("n/0.1", TERM, "over")]
    assert node.feed(Heard(SECOND)) == [], "an agent that ends starts nothing"
    assert Signal("n/0.1", KILL, "over") not in node.feed(Tick(), at=11.4)
    assert Signal("n/0.1", KILL, "over") in node.feed(Tick(), at=11.6)
    assert node.feed(ProcessEnded("n/0.1", -9)) == [
        exited(-9, "over", blameless=True),
        Report(Goodbye("over")),
        EndAgent(3, "over"),
    ]


def test_a_drained_agent_gives_its_workers_time_to_leave() -> None:
    node = Node().with_worker()
    assert node.feed(Heard(Shutdown("drained", 0)), at=10.0) == []
    assert Signal("n/0.1", KILL, "drained") not in node.feed(Tick(), at=19.9)
    assert Signal("n/0.1", KILL, "drained") in node.feed(Tick(), at=20.1)
    assert node.feed(ProcessEnded("n/0.1", 0))[-1] == EndAgent(0, "drained")


def test_an_agent_without_workers_ends_at_once() -> None:
    assert Node().feed(EndAsked("SIGTERM received")) == [
        Report(Goodbye("SIGTERM received")),
        EndAgent(0, "SIGTERM received"),
    ]
    assert Node().feed(Heard(Refused("wrong job"))) == [Report(Goodbye("wrong job")), EndAgent(1, "wrong job")]


def test_heartbeats_come_eight_times_in_a_failure_timeout() -> None:
    node = Node()
    assert node.feed(Tick(), at=0.0) == [Report(Heartbeat(1, ()))]
    assert node.feed(Tick(), at=0.2) == []
    assert node.feed(Tick(), at=0.25) == [Report(Heartbeat(2, ()))]


def test_a_silent_controller_is_given_up_also_before_its_welcome() -> None:
    node = Node(attached=False)
    node.feed(Connected(), at=1.0)
    assert node.feed(Tick(), at=5.0) == []
    assert node.feed(Tick(), at=5.1) == [DropConnection("the controller has been silent for 4.1 s")]


def test_workers_wait_for_a_controller_only_so_long() -> None:
    node = Node(controller_timeout_s=20.0).with_worker()
    node.feed(Disconnected("reset"), at=1.0)
    node.feed(Connected(), Disconnected("refused"), at=15.0)
    assert node.feed(Tick(), at=20.9) == []
    (effect,) = node.feed(Tick(), at=21.1)
    assert isinstance(effect, Signal) and effect.signum == TERM and "--controller-timeout" in effect.reason


def test_a_controller_that_was_never_there_is_given_up_sooner() -> None:
    node = Node(attached=False, connect_timeout_s=3.0)
    node.feed(Disconnected("refused"), at=1.0)
    assert node.feed(Tick(), at=3.9) == []
    (effect,) = node.feed(Tick(), at=4.1)
    assert isinstance(effect, EndAgent) and effect.code == 1 and "--connect-timeout" in effect.reason


# -- hangs ---------------------------------------------------------------------------------------------------------


def is_lost(node: Node, look: Looked, at: float) -> bool:
    effects = node.feed(look, at=at)
    exits = [e.message for e in effects if isinstance(e, Report) and isinstance(e.message, WorkerExited)]
    assert all((e.detected_by, e.blameless) == ("progress", False) for e in exits)
    assert all("no progress for" in e.reason for e in exits)
    return bool(exits) and Signal("n/0.1", KILL, exits[0].reason) in effects


def worker_that_trains(**timeouts: int) -> Node:
    node = Node().with_worker()
    node.feed(Heard(Welcome(keep=("n/0.1",), **timeouts)))
    for step in range(1, 5):
        node.feed(looked("R", step, step), at=6.0 + step)
    return node


def test_no_progress_in_user_code_for_ten_seconds_is_a_hang() -> None:
    node = worker_that_trains()
    assert not is_lost(node, looked("R", 4, 4), at=19.9)
    assert is_lost(node, looked("R", 4, 4), at=20.1)
    assert node.feed(looked("R", 4, 4), at=40.0) == []


def test_a_hang_is_suspected_a_second_before_it_is_believed_and_again_after_progress() -> None:
    node = worker_that_trains()
    assert node.feed(looked("R", 4, 4, operation=Operation.BACKWARD), at=18.9) == []
    suspected = Report(Suspected("n/0.1", "no progress for 9.1 s in backward", "progress"))
    assert node.feed(looked("R", 4, 4, operation=Operation.BACKWARD), at=19.1) == [suspected]
    assert node.feed(looked("R", 4, 4, operation=Operation.BACKWARD), at=19.5) == []
    assert node.feed(looked("R", 4, 5), at=19.6) == []
    (again,) = node.feed(looked("R", 4, 5), at=29.0)
    assert isinstance(again, Report) and isinstance(again.message, Suspected)
    assert is_lost(node, looked("R", 4, 5), at=29.7)


def test_workers_are_looked_at_when_the_controller_asks() -> None:
    order = CollectEvidence(7, 1000, 1 << 20)
    assert Node().feed(Heard(order)) == [CarryOut(order)]


def test_a_long_step_earns_five_times_its_length() -> None:
    node = worker_that_trains()
    node.feed(looked("R", 5, 5), at=14.0)
    assert not is_lost(node, looked("R", 5, 5), at=33.9)
    assert is_lost(node, looked("R", 5, 5), at=34.1)


def test_saving_has_a_limit_of_its_own_learned_from_what_it_has_taken() -> None:
    node = worker_that_trains(start_timeout_ms=60_000)
    saving = looked("R", 4, 4, operation=Operation.CALLBACK)
    node.feed(saving, at=10.1)
    assert not is_lost(node, saving, at=69.9), "nobody has seen yet how long it takes"
    node.feed(looked("R", 4, 5, operation=Operation.DATA), at=50.1)
    node.feed(looked("R", 5, 6), at=50.5)
    assert not is_lost(node, looked("R", 5, 6, operation=Operation.SLOT), at=60.4)
    assert is_lost(node, looked("R", 5, 6, operation=Operation.SLOT), at=60.6), "that saving took 40 s says nothing of steps"
    node = worker_that_trains(start_timeout_ms=600_000)
    node.feed(saving, at=10.1)
    node.feed(looked("R", 4, 5), at=14.1)
    saving = looked("R", 4, 5, operation=Operation.CALLBACK)
    node.feed(saving, at=15.0)
    assert not is_lost(node, saving, at=34.0)
    assert is_lost(node, saving, at=34.2), "five times the four seconds that it took"


def test_the_hang_timeout_that_was_given_counts() -> None:
    assert is_lost(worker_that_trains(hang_timeout_ms=3000), looked("R", 4, 4), at=13.1)


@pytest.mark.parametrize(
    "look",
    [looked("R", 4, 5), looked("R", 4, 4, waits=True), looked("R", 4, 4, busy_until_s=30.0)],
    ids=["an evaluation makes progress", "it waits for others", "it has announced to be busy"],
)
def test_what_is_no_hang(look: Looked) -> None:
    node = worker_that_trains()
    assert not is_lost(node, look, at=19.9)
    assert not is_lost(node, looked("R", 4, look.progress, busy_until_s=look.busy_until_s), at=25.0)
    assert is_lost(node, looked("R", 4, look.progress, busy_until_s=look.busy_until_s), at=50.0)


def test_before_its_first_commit_and_after_its_loop_a_worker_has_the_start_timeout() -> None:
    node = Node().with_worker()
    node.feed(Heard(Welcome(keep=("n/0.1",), start_timeout_ms=60_000)))
    node.feed(looked("R", 0, 1), at=1.0)
    assert not is_lost(node, looked("R", 0, 1), at=60.9)
    assert is_lost(node, looked("R", 0, 1), at=61.1)
    node = worker_that_trains(start_timeout_ms=60_000)
    node.feed(WorkerSaid("n/0.1", Leaving(4)))
    assert not is_lost(node, looked("R", 4, 4), at=69.9)
    assert is_lost(node, looked("R", 4, 4), at=70.1)


def test_peers_are_probed_and_the_answer_is_passed_on() -> None:
    order = ProbePeers(3, (Peer("m", "m:1"),), 500)
    node = Node()
    assert node.feed(Heard(order)) == [CarryOut(order)]
    assert node.feed(CarriedOut(PeersProbed(3, ("m",)))) == [Report(PeersProbed(3, ("m",)))]
