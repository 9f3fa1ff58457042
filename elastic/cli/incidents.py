"""`elastic incidents`: what has gone wrong in a job, and where all its workers were when it did."""

from __future__ import annotations

import json

import click
from rich.console import Console

from elastic.cli import options
from elastic.cli.people import People, incidents_table
from elastic.wire.convert import to_plain


@click.group(invoke_without_command=True)
@options.controller_address
@options.as_json
@click.pass_context
def incidents(context: click.Context, controller: str, as_json: bool) -> None:
    """List the job's incidents, the newest last; `show N` says where all workers were at one."""
    context.obj = controller
    if context.invoked_subcommand is not None:
        return
    reply = People(controller).status()
    if as_json:
        click.echo(json.dumps([to_plain(incident) for incident in reply.incidents], indent=2))
    elif reply.incidents:
        Console().print(incidents_table(reply, newest=len(reply.incidents)))
    else:
        click.echo(f"job {reply.job} has had no incident")


@incidents.command()
@click.argument("number", type=click.IntRange(1))
@options.as_json
@click.pass_obj
def show(controller: str, number: int, as_json: bool) -> None:
    """Say where all workers were when incident NUMBER began, and who held the others up."""
    people = People(controller)
    evidence = people.evidence(number)
    incident = next((each for each in people.status().incidents if each.number == number), None)
    if as_json:
        found = json.loads(evidence.json)
        found |= {"path": evidence.path} | ({"incident": to_plain(incident)} if incident is not None else {})
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(evidence.summary, nl=False)
    if incident is not None and incident.seconds_lost >= 0:
        click.echo(f"\n{incident.seconds_lost:.2f} s lost, {incident.steps_redone} step(s) redone")
    click.echo(f"\nstacks, logs, ledger and versions: {evidence.path}")
