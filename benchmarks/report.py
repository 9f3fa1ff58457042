"""What every benchmark's command has in common: flags, progress, and JSON or a table at the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elastic.errors import ConfigError, ElasticError
from examples.cluster import ClusterError, end_on_signals, temporary_folder


class Reporter:
    """Progress on stderr, so that stdout holds the result alone."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._began_s = time.monotonic()

    def say(self, text: str) -> None:
        """Print one line, with the time since the start."""
        self.console.print(
            f"[dim]{time.monotonic() - self._began_s:7.1f} s[/dim]  {escape(text)}", soft_wrap=True
        )


def command(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring."""
    return argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def pyplot() -> Any:
    """Return what draws pictures. Raises ConfigError if it is not installed."""
    try:
        import matplotlib  # only for pictures
    except ImportError as error:
        raise ConfigError("--plot draws with matplotlib: pip install 'elastic-runtime[plots]', or leave it out") from error
    matplotlib.use("agg")
    from matplotlib import pyplot as found

    return found


Work = Callable[[argparse.Namespace, Path, Reporter], tuple[dict[str, Any], bool]]


def main_of(parser: argparse.ArgumentParser, work: Work, tabulate: Callable[[dict[str, Any]], Table]) -> int:
    """Run a benchmark as a command; returns the exit code: 0 only if what it found is sound.

    Args:
        parser: With the benchmark's own flags; --json and --quick are added.
        work: Measures; returns the report and whether it is sound.
        tabulate: Makes the report's table for people.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: less than two minutes")
    arguments = parser.parse_args()
    reporter = Reporter()
    end_on_signals()
    began_s = time.monotonic()
    load = os.getloadavg()[0]
    try:
        with temporary_folder() as folder:
            report, sound = work(arguments, folder, reporter)
    except (ClusterError, ElasticError, OSError) as error:
        reporter.console.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        reporter.console.print("interrupted; everything that was started has ended")
        return 130
    report["machine"] = {
        "cores": len(os.sched_getaffinity(0)),
        "torch": version("torch"),
        "python": platform.python_version(),
        "load_before": round(load, 2),
    }
    report["elapsed_s"] = round(time.monotonic() - began_s, 1)
    if arguments.json:
        print(json.dumps(report))
    else:
        Console().print(tabulate(report))
    return 0 if sound else 1
