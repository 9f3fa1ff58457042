"""Start a controller: `python -m elastic.launch controller SETTINGS` with one JSON object, as the command builds it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from controller.server import ControllerConfig, serve
from controller.state import JobSettings
from elastic import config
from elastic.errors import ElasticError
from elastic.lifeline import die_with_parent
from monitoring.exporter import exporter_config


def main() -> int:
    """Run until the job is over; a fault of the user is one sentence and exit code 2."""
    given = json.loads(sys.argv[1])
    if given["parent"]:
        die_with_parent(given["parent"])
    try:
        settings = JobSettings(**given["settings"], token=config.join_token())
        return asyncio.run(
            serve(
                ControllerConfig(
                    settings=settings,
                    ledger=Path(given["ledger"]),
                    host=given["host"],
                    port=given["port"],
                    port_file=Path(given["port_file"]) if given["port_file"] else None,
                    summary=Path(given["summary"]) if given["summary"] else None,
                    metrics=exporter_config(given["metrics"]),
                    log_format=given["log_format"],
                )
            )
        )
    except ElasticError as error:
        print(f"elastic controller: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
