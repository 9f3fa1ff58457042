"""Start an agent: `python -m elastic.launch agent SETTINGS` with one JSON object, as the command builds it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from agent.processes import Script
from agent.server import AgentConfig, serve
from elastic import config
from elastic.errors import ElasticError
from elastic.lifeline import die_with_parent
from monitoring.exporter import exporter_config


def main() -> int:
    """Run until the controller lets this node go; a fault of the user is one sentence and exit code 2."""
    given = json.loads(sys.argv[1])
    if given.pop("parent"):
        die_with_parent(json.loads(sys.argv[1])["parent"])
    script = given.pop("script")
    try:
        settings = AgentConfig(
            **{key: value for key, value in given.items() if key not in ("log_dir", "labels", "metrics")},
            log_dir=Path(given["log_dir"]),
            labels=tuple((key, value) for key, value in sorted(given["labels"].items())),
            script=Script(tuple(script["argv"]), script["module"], Path(script["cwd"])),
            token=config.join_token(),
            metrics=exporter_config(given["metrics"]),
        )
        return asyncio.run(serve(settings))
    except ElasticError as error:
        print(f"elastic agent: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
