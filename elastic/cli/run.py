"""`elastic run`: a controller and an agent for this machine, watched, with a live view and a summary at the end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from elastic.cli import options
from elastic.cli.daemons import agent_settings, controller_settings, daemon_command
from elastic.cli.people import People, headline
from elastic.config import default_run_dir
from elastic.domain import StatusReply
from elastic.errors import JobFailed, Unreachable
from elastic.logs import Log
from elastic.wire.channels import join_address

POLL_S = 0.2
PLAIN_LINE_S = 10.0  # between lines about the progress where nobody looks at a terminal
START_TIMEOUT_S = 30.0
LAST_CHECKPOINT_S = 40.0  # for an end that writes a checkpoint first
STOP_TIMEOUT_S = 2.5  # for an end in order; with what follows by force it stays below five seconds
FORCE_TIMEOUT_S = 2.0  # an agent needs 1.5 s for workers that do not want to end, and knows what they started
INTERRUPTED = 130


@click.command(context_settings=options.SCRIPT_CONTEXT)
@options.job_name
@options.job_settings
@options.agent_settings
@options.metrics_settings
@options.log_format
@click.option("--controller", "--rdzv-endpoint", "--rdzv_endpoint", "controller", default=None, metavar="HOST:PORT",
              help="Join the controller there instead of starting one.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that the embedded controller listens on.")
@click.option("--port", type=click.IntRange(0, 65535), default=None,
              help="Its port [default: 29400 if free, else any].")  # fmt: skip
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Directory for ledger and logs; with the ledger of an unfinished job in it, that job resumes "
              "[default: a new one under the temporary directory].")  # fmt: skip
@click.option("--summary", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="File for the summary, as JSON.")  # fmt: skip
@click.option("--standalone", is_flag=True, help="Accepted for torchrun's sake; it is the default.")
@options.as_json
@options.script_arguments
def run(
    *,
    controller: str | None,
    host: str,
    port: int | None,
    run_dir: Path | None,
    summary: Path | None,
    standalone: bool,
    as_json: bool,
    job: str,
    nnodes: tuple[int, int],
    max_restarts: int,
    failure_timeout: float,
    start_timeout: float,
    hang_timeout: float,
    join_timeout: float,
    snapshot_every: int,
    redundancy: tuple[int, int],
    approximate_recovery: bool,
    norm_exponent: float,
    approximate_moments: str,
    swap_ends: bool,
    skip_ratio: float,
    flops_per_sample: float,
    peak_flops: float,
    checkpoint_dir: str,
    checkpoint_every: int,
    checkpoint_keep: int,
    metrics_port: int | None,
    metrics_host: str,
    log_format: str,
    **given: Any,
) -> None:
    """Train SCRIPT on this machine (and on others that join), and keep going through failures."""
    if controller is not None:
        settings = agent_settings(
            controller=controller, job=job, metrics_port=metrics_port, metrics_host=metrics_host, log_format=log_format, **given
        )
        command = daemon_command("agent", settings)
        os.execv(command[0], command)
    options.check_script(given["script"], module=given["module"])
    options.parse_labels(given["labels"])  # before anything is started
    folder = run_dir or default_run_dir(f"{job}-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    given["log_dir"] = given["log_dir"] or folder / "logs"
    given["metrics_port"] = metrics_port + 1 if metrics_port else metrics_port  # the controller's is the one that was given
    given["metrics_host"], given["metrics_targets"] = metrics_host, folder / "metrics-agent.json"
    given["log_format"] = log_format
    base = controller_settings(
        job=job,
        nnodes=nnodes,
        max_restarts=max_restarts,
        failure_timeout=failure_timeout,
        start_timeout=start_timeout,
        hang_timeout=hang_timeout,
        join_timeout=join_timeout,
        snapshot_every=snapshot_every,
        redundancy=redundancy,
        approximate_recovery=approximate_recovery,
        norm_exponent=norm_exponent,
        approximate_moments=approximate_moments,
        swap_ends=swap_ends,
        skip_ratio=skip_ratio,
        flops_per_sample=flops_per_sample,
        peak_flops=peak_flops,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        checkpoint_keep=checkpoint_keep,
        ledger=folder / "ledger.sqlite",
        host=host,
        port=0 if port is None else port,
        port_file=folder / "controller.port",
        summary=folder / "summary.json",
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        metrics_targets=folder / "metrics-controller.json",
        log_format=log_format,
        parent=os.getpid(),
    )
    if port is None and _is_free(host, options.DEFAULT_PORT):
        base["port"] = options.DEFAULT_PORT
    job_run = JobRun(folder, base, {**given, "job": job}, host)
    code = job_run.to_end()
    job_run.report(summary, as_json=as_json)
    sys.exit(code)


def _is_free(host: str, port: int) -> bool:
    import socket

    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class JobRun:
    """Two daemons and what a person sees of them."""

    def __init__(self, folder: Path, controller: dict[str, Any], agent: dict[str, Any], host: str) -> None:
        self.folder = folder
        self.console = Console(stderr=True)
        self._log = Log("run", agent["job"], as_json=agent["log_format"] == "json", where=self._where)
        self._seen: StatusReply | None = None  # the newest status
        self._controller_settings = controller
        self._agent_options = agent
        self._host = host
        self._address = ""
        self._controller: subprocess.Popen[bytes] | None = None
        self._agent: subprocess.Popen[bytes] | None = None
        self._people: People | None = None
        self._interrupted = 0
        self._writes_checkpoints = bool(controller["settings"]["checkpoint_target"])
        self._code = 1
        (folder / "summary.json").unlink(missing_ok=True)

    # -- the daemons -----------------------------------------------------------------------------------------------

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches this process only, which then ends everything in order.
        piped = self.console.is_terminal
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else None,
            stderr=subprocess.STDOUT if piped else None,
            start_new_session=True,
        )
        if process.stdout is not None:
            threading.Thread(target=self._echo, args=(process.stdout,), daemon=True).start()
        return process

    def _echo(self, lines: IO[bytes]) -> None:
        for line in lines:
            self.console.print(Text(line.decode(errors="replace").rstrip("\n")))

    def _start_controller(self) -> None:
        port_file = Path(self._controller_settings["port_file"])
        port_file.unlink(missing_ok=True)
        self._controller = self._start(daemon_command("controller", self._controller_settings))
        deadline = time.monotonic() + START_TIMEOUT_S
        while not port_file.exists():
            if self._controller.poll() is not None:
                raise JobFailed(f"the controller did not start (exit code {self._controller.returncode}), see above")
            if time.monotonic() > deadline:
                raise JobFailed(f"the controller did not start within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.01)
        self._controller_settings["port"] = int(port_file.read_text())
        self._address = join_address(self._host, self._controller_settings["port"])
        if self._people is not None:
            self._people.close()
        self._people = People(self._address)

    def _start_agent(self) -> None:
        settings = agent_settings(controller=self._address, parent=os.getpid(), **self._agent_options)
        self._agent = self._start(daemon_command("agent", settings))

    # -- the life of the job ---------------------------------------------------------------------------------------

    def to_end(self) -> int:
        """Run the job to its end; returns the exit code."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._interrupt)
        try:
            self._start_controller()
            if not self._interrupted:
                self._start_agent()
            self._say(f"run directory {self.folder}, controller at {self._address}")
            if self.console.is_terminal and not self._log.as_json:
                with Live(Text("starting"), console=self.console, refresh_per_second=5, transient=True) as live:
                    self._watch(live)
            else:
                self._watch(None)
        except KeyboardInterrupt:
            pass  # asked twice: not in order any more
        finally:
            self._end()
        return INTERRUPTED if self._interrupted else self._code

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._interrupted += 1
        if self._interrupted == 2:
            raise KeyboardInterrupt

    def _watch(self, live: Live | None) -> None:
        interrupted_at: float | None = None
        line_at = time.monotonic() + PLAIN_LINE_S
        while True:
            assert self._controller is not None
            code = self._controller.poll()
            if code is not None and (code >= 0 or self._interrupted):
                self._code = code if code >= 0 else 1
                return
            if self._interrupted:
                if interrupted_at is None:
                    interrupted_at = time.monotonic()
                    self._controller.send_signal(signal.SIGTERM)
                patience_s = LAST_CHECKPOINT_S if self._writes_checkpoints else STOP_TIMEOUT_S
                if time.monotonic() - interrupted_at > patience_s:
                    return
            elif code is not None:
                self._say("the controller was killed; starting it again on its ledger")
                self._start_controller()
            elif self._agent is not None and self._agent.poll() == 2:
                raise JobFailed("the agent did not start (exit code 2), see above")
            elif self._agent is not None and (self._agent.poll() or 0) < 0:
                self._say("the agent was killed; starting it again")
                self._start_agent()
            elif live is not None:
                live.update(self._view())
            elif time.monotonic() > line_at:
                line_at = time.monotonic() + PLAIN_LINE_S
                self._show_status()
            time.sleep(POLL_S)

    def _view(self) -> Table | Text:
        assert self._people is not None
        try:
            self._seen = self._people.status(timeout_s=1.0)
        except Unreachable:
            return Text("the controller does not answer")
        return _view(self._seen)

    def _show_status(self) -> None:
        """Say how the job is, in a pipe."""
        view = self._view()
        if not self._log.as_json:
            self.console.print(view, soft_wrap=True)
        elif isinstance(view, Text):
            self._log.say(view.plain)
        else:
            seen = self._seen
            assert seen is not None
            loss = None if math.isnan(seen.loss) else seen.loss
            self._log.say(f"job {seen.job} is {seen.state}", world=seen.world_size, loss=loss)

    def _say(self, message: str) -> None:
        """Write a line of this command's own."""
        if self._log.as_json:
            self._log.say(message)
        else:
            self.console.print(f"elastic: {message}", highlight=False)

    def _where(self) -> tuple[int, int]:
        return (0, 0) if self._seen is None else (self._seen.generation, self._seen.step)

    def _end(self) -> None:
        """Leave nothing behind: first in order, then by force."""
        processes = [process for process in (self._controller, self._agent) if process is not None]
        if self._interrupted < 2 and processes and processes[0].poll() is not None:
            _wait(processes, FORCE_TIMEOUT_S if self._interrupted else STOP_TIMEOUT_S)  # the agent was told to end
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        _wait(processes, FORCE_TIMEOUT_S)
        for process in processes:
            process.kill()  # what they started dies with them
            process.wait()
        if self._people is not None:
            self._people.close()

    # -- the summary -----------------------------------------------------------------------------------------------

    def report(self, target: Path | None, *, as_json: bool) -> None:
        """Print the summary of the run, and copy it to a file."""
        source = self.folder / "summary.json"
        if not source.exists():
            self._say("the job left no summary")
            return
        summary = json.loads(source.read_text())
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        if as_json:
            click.echo(json.dumps(summary))
            return
        if self._log.as_json:
            self._log.say(f"job {summary['job']} {summary['state']}: {summary['reason']}", summary=summary)
            return
        if summary.get("traceback"):
            self.console.print(Text(summary["traceback"]))
        self.console.print(_summary_table(summary))


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Wait until all have ended, or the time is up."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def _view(reply: StatusReply) -> Table:
    grid = Table.grid()
    grid.add_row(headline(reply))
    if reply.incidents:
        last = reply.incidents[-1]
        cost = "under way" if last.seconds_lost < 0 else f"{last.seconds_lost:.2f} s lost"
        grid.add_row(f"last incident: {escape(last.kind)}, {escape(last.subject)} ({escape(last.reason)}), {cost}")
    return grid


def _summary_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"job {summary['job']}: {summary['state']}", show_header=False)
    table.add_row("reason", summary["reason"])
    table.add_row("steps", str(summary["step"]))
    table.add_row("samples", str(summary["samples"]))
    table.add_row("seconds", f"{summary['elapsed_s']:.1f}")
    table.add_row("goodput", f"{100 * summary['goodput']:.1f} %")
    table.add_row("incidents", str(summary["incidents_total"]))
    for words in summary["approximations"]:
        table.add_row("approximate", words)
    table.add_row("digest", summary["digest"] or "-")
    return table


