"""`elastic doctor`: whether this machine is ready for a job, and what to do where it is not."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elastic.cli import options
from elastic.cli.daemons import daemon_command
from elastic.config import worker_base_environment

TIMEOUT_S = 120.0  # torch may come from a slow disk
Finding = dict[str, Any]
"""`agent.doctor.Finding` as JSON: check, result, advice, hinders."""


@click.command()
@options.snapshot_memory
@options.as_json
def doctor(snapshot_memory: int | None, as_json: bool) -> None:
    """Look at this machine: whether a job can run here, with which engines, and what to do where something is amiss."""
    findings = examine(options.default_snapshot_memory() if snapshot_memory is None else snapshot_memory)
    hindering = [finding for finding in findings if finding["hinders"]]
    if as_json:
        click.echo(json.dumps({"ready": not hindering, "checks": findings}, indent=2))
    else:
        Console().print(findings_table(findings))
    if hindering:
        sentences = (f"{finding['result']}: {finding['advice']}" for finding in hindering)
        raise click.ClickException(f"this machine is not ready: {'; '.join(sentences)}")


def examine(snapshot_memory_bytes: int) -> list[Finding]:
    """Have the checks made in a process with a worker's environment; that they cannot be made is a finding too."""
    command = daemon_command("doctor", {"snapshot_memory_bytes": snapshot_memory_bytes})
    try:
        done = subprocess.run(
            command,
            env=worker_base_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return [_not_made(f"they did not end within {TIMEOUT_S:.0f} s", "run it again when the machine is less busy")]
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [_not_made(said[-1], "install elastic-runtime anew for the Python that runs `elastic`")]
    findings: list[Finding] = json.loads(done.stdout.splitlines()[-1])  # libraries may have printed before
    return findings


def _not_made(reason: str, advice: str) -> Finding:
    return {"check": "checks", "result": f"the checks could not be made: {reason}", "advice": advice, "hinders": True}


def findings_table(findings: list[Finding]) -> Table:
    """Return what was found, for people."""
    table = Table("check", "result", "what to do")
    for finding in findings:
        colour = "red" if finding["hinders"] else "yellow" if finding["advice"] else "green"
        table.add_row(
            finding["check"], f"[{colour}]{escape(finding['result'])}[/{colour}]", escape(finding["advice"] or "-")
        )
    return table
