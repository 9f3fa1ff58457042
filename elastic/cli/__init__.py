"""The `elastic` command. Flags beat the environment (ELASTIC_...), which beats the settings file, which beats defaults."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from elastic import __version__
from elastic.cli.daemons import agent, controller
from elastic.cli.doctor import doctor
from elastic.cli.incidents import incidents
from elastic.cli.people import checkpoint, drain, events, status, stop
from elastic.cli.plan import plan
from elastic.cli.run import INTERRUPTED, run
from elastic.cli.sync import sync
from elastic.config import load_defaults
from elastic.errors import ElasticError


@click.group(context_settings={"auto_envvar_prefix": "ELASTIC", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="elastic")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Settings file (TOML), one table per command, such as [run].",
)
@click.pass_context
def elastic(context: click.Context, config_file: Path | None) -> None:
    """Keep a PyTorch training job going through failures, preemptions and changes of size."""
    if config_file is not None:
        context.default_map = load_defaults(config_file)


for command in (run, controller, agent, status, events, incidents, checkpoint, drain, stop, doctor, plan, sync):
    elastic.add_command(command)


def main() -> None:
    """Entry point of the `elastic` command: an error on purpose is one sentence and exit code 2."""
    try:
        sys.exit(elastic(args=sys.argv[1:] or ["--help"], standalone_mode=False))
    except click.ClickException as error:
        click.echo(f"elastic: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except ElasticError as error:
        click.echo(f"elastic: {error}", err=True)
        sys.exit(2)
    except click.Abort:
        sys.exit(INTERRUPTED)
