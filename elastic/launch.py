"""Run a daemon in this interpreter: `python -m elastic.launch controller|agent|keeper|checkpointer|doctor|planner ARGS...`.

The daemons' folders have names that users' repositories use too, so they are on nobody's path: this module
puts them first, here. It must never run in a training process nor set PYTHONPATH: no script may see them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

DAEMONS = {
    "controller": "controller.__main__",
    "agent": "agent.__main__",
    "keeper": "agent.keeper",
    "checkpointer": "agent.checkpointer",
    "doctor": "agent.doctor",
    "planner": "recovery.planner",
}
"""Each one's name, and the module whose `main()` it is. Keeper and checkpointer are started by an agent alone; doctor and
planner only look, and end."""


def main(argv: list[str]) -> int:
    """Hand `argv` (a daemon's name and its arguments) to that daemon's `main()`; the exit code."""
    if not argv or argv[0] not in DAEMONS:
        given = f"not {argv[0]!r}" if argv else "and none was given"
        print(
            f"elastic.launch: the first argument names the daemon, {', '.join(DAEMONS)}, {given}.",
            file=sys.stderr,
        )
        return 2
    package = Path(__file__).resolve().parent
    installed = package / "_daemons"
    if not sys.flags.safe_path:
        del sys.path[0]  # `-m` put the user's working directory there, and it may hold any name
    sys.path.insert(0, str(installed if installed.is_dir() else package.parent))
    sys.argv = [f"elastic {argv[0]}", *argv[1:]]
    return int(import_module(DAEMONS[argv[0]]).main() or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
