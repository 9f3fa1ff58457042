"""`elastic status`, `events`, `drain`, `stop`: what people ask a controller."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator

import click
import grpc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elastic.cli import options
from elastic.domain import NO_STEP, EvidenceReply, PlanReply, StatusReply
from elastic.errors import ElasticError
from elastic.v1 import runtime_pb2, runtime_pb2_grpc
from elastic.wire import channels
from elastic.wire.convert import from_proto, to_plain

CALL_TIMEOUT_S = 5.0


class People:
    """A connection to a controller for people's questions; failures are one sentence."""

    def __init__(self, address: str) -> None:
        channels.parse_address(address, what="--controller")
        self._address = address
        self._channel = channels.blocking_client(address)
        self._stub = runtime_pb2_grpc.PeopleStub(self._channel)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise channels.explain(error, self._address, "controller") from error

    def status(self, timeout_s: float = CALL_TIMEOUT_S) -> StatusReply:
        """Return the job's status."""
        with self._explained():
            return from_proto(self._stub.Status(runtime_pb2.StatusRequest(), timeout=timeout_s), StatusReply)

    def events(self, after: int, *, follow: bool) -> Iterator[runtime_pb2.Event]:
        """Yield events; following ends with the job."""
        with self._explained():
            yield from self._stub.Events(
                runtime_pb2.EventsRequest(after=after, follow=follow), timeout=None if follow else CALL_TIMEOUT_S
            )

    def plan(self) -> PlanReply:
        """Return how the job's pipeline is cut."""
        with self._explained():
            return from_proto(self._stub.Plan(runtime_pb2.PlanRequest(), timeout=CALL_TIMEOUT_S), PlanReply)

    def evidence(self, incident: int) -> EvidenceReply:
        """Return what is known of where all workers were at an incident."""
        with self._explained():
            reply = self._stub.Evidence(runtime_pb2.EvidenceRequest(incident=incident), timeout=CALL_TIMEOUT_S)
            return from_proto(reply, EvidenceReply)

    def drain(self, node: str) -> str:
        """Ask a node to leave."""
        with self._explained():
            return self._stub.Drain(runtime_pb2.DrainRequest(node=node), timeout=CALL_TIMEOUT_S).text

    def checkpoint(self, timeout_s: float) -> str:
        """Have a checkpoint written; returns when it is."""
        with self._explained():
            return self._stub.Checkpoint(runtime_pb2.CheckpointRequest(), timeout=timeout_s).text

    def stop(self, reason: str) -> str:
        """End the job."""
        with self._explained():
            return self._stub.Stop(runtime_pb2.StopRequest(reason=reason), timeout=CALL_TIMEOUT_S).text

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


@click.command()
@options.controller_address
@options.as_json
def status(controller: str, as_json: bool) -> None:
    """Show the job: state, step, nodes, workers, last incidents."""
    reply = People(controller).status()
    if as_json:
        click.echo(json.dumps(to_plain(reply), indent=2))
        return
    console = Console()
    console.print(headline(reply))
    console.print(nodes_table(reply))
    for words in reply.approximations:
        console.print(f"[yellow]approximate[/yellow]  {escape(words)}", soft_wrap=True)
    if reply.incidents:
        console.print(incidents_table(reply))


@click.command()
@options.controller_address
@click.option("--follow", "-f", is_flag=True, help="Keep printing as events happen, until the job ends.")
@click.option("--after", type=click.IntRange(0), default=0, help="Only events with a higher number.")
@options.as_json
def events(controller: str, follow: bool, after: int, as_json: bool) -> None:
    """Print the job's history, oldest first."""
    for event in People(controller).events(after, follow=follow):
        if as_json:
            record = {
                "sequence": event.sequence,
                "at_unix_s": event.at_unix_s,
                "kind": event.kind,
                "text": event.text,
                "data": json.loads(event.json),
            }
            click.echo(json.dumps(record))
        else:
            clock = time.strftime("%H:%M:%S", time.localtime(event.at_unix_s))
            click.echo(f"{clock}  {event.sequence:>5}  {event.text}")


@click.command()
@options.controller_address
@click.option("--timeout", type=click.FloatRange(0.1), default=600.0, show_default=True, help="Seconds to wait for it.")
def checkpoint(controller: str, timeout: float) -> None:
    """Write a checkpoint now, from the newest snapshot in memory, and wait until it is whole."""
    click.echo(People(controller).checkpoint(timeout))


@click.command()
@options.controller_address
@click.option("--timeout", type=click.FloatRange(0.1), default=120.0, show_default=True,
              help="Seconds to wait until the node has left.")  # fmt: skip
@options.as_json
@click.argument("node")
def drain(controller: str, timeout: float, as_json: bool, node: str) -> None:
    """Let NODE finish its step and leave; returns when it has left."""
    people = People(controller)
    began = time.monotonic()
    answer = people.drain(node)
    if not as_json:
        click.echo(answer)
    while time.monotonic() < began + timeout:
        states = {view.id: view.state for view in people.status().nodes}
        if states.get(node) in ("left", "lost", None):
            seconds = time.monotonic() - began
            left = {"node": node, "state": states.get(node, "left"), "seconds": seconds}
            click.echo(json.dumps(left) if as_json else f"node {node} has left")
            return
        time.sleep(0.1)
    raise ElasticError(f"node {node} has not left within {timeout:.0f} s; it is still draining (see `elastic status`)")


@click.command()
@options.controller_address
@click.option("--reason", default="stopped with `elastic stop`", show_default=True, help="Kept in the ledger.")
@options.as_json
def stop(controller: str, reason: str, as_json: bool) -> None:
    """End the job in order."""
    answer = People(controller).stop(reason)
    click.echo(json.dumps({"state": "stopping", "reason": reason}) if as_json else answer)


# How a status looks -------------------------------------------------------------------------------------------------

_COLOURS = {"running": "green", "succeeded": "green", "failed": "red", "stopped": "yellow"}


def headline(reply: StatusReply) -> str:
    """Return the job in one line, with rich's markup."""
    colour = _COLOURS.get(reply.state, "cyan")
    loss = "" if math.isnan(reply.loss) else f"  loss {reply.loss:.4f}"
    rate = f"  {1 / reply.step_s:.2f} steps/s" if reply.step_s else ""
    reason = f"  ({reply.reason})" if reply.reason else ""
    memory = ""
    if reply.stable != NO_STEP:
        at_risk = max(0, reply.step - reply.stable)
        memory = f"  snapshot of step {reply.stable} ({at_risk} at risk; vulnerable for {reply.vulnerable_s:.1f} s in all)"
    if reply.is_vulnerable and reply.state == "running":
        memory += "  [yellow]no snapshot is safe in this world yet[/yellow]"
    return (
        f"job [bold]{reply.job}[/bold]  [{colour}]{reply.state}[/{colour}]{reason}  generation {reply.generation}  "
        f"step {reply.step}  world {reply.world_size}{loss}{rate}{memory}{_durable(reply)}"
    )


def _durable(reply: StatusReply) -> str:
    """What there is to say of the durable tier."""
    saved = f"  checkpoint of step {reply.saved}" if reply.saved != NO_STEP else ""
    return f"{saved}  [red]no checkpoint written: {escape(reply.save_fault)}[/red]" if reply.save_fault else saved


def nodes_table(reply: StatusReply) -> Table:
    """Return nodes and workers as a table."""
    table = Table("node", "state", "agent pid", "silent s", "worker", "rank", "pid", "state", "step")
    for node in reply.nodes:
        first = (node.id, node.state, str(node.agent_pid), f"{node.heartbeat_age_s:.1f}")
        if not node.workers:
            table.add_row(*first)
        for worker in node.workers:
            rank = str(worker.rank) if worker.state in ("member", "leaving") else "-"
            row = (worker.worker, rank, str(worker.pid), worker.state, str(worker.committed))
            table.add_row(*first, *row)
            first = ("", "", "", "")
    return table


def incidents_table(reply: StatusReply, newest: int = 10) -> Table:
    """Return the newest incidents as a table."""
    table = Table("no.", "incident", "subject", "found by", "reason", "step", "seconds lost", "steps redone")
    for incident in reply.incidents[-newest:]:
        lost = "open" if incident.seconds_lost < 0 else f"{incident.seconds_lost:.2f}"
        table.add_row(
            str(incident.number),
            incident.kind,
            incident.subject,
            incident.detected_by,
            incident.reason,
            str(incident.step),
            lost,
            str(incident.steps_redone),
        )
    return table
