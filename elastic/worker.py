"""Run the user's script in this process as `__main__`, and end the process in order.

Called in a freshly forked worker. An exception in user code is told to the agent (with step, slot and sample ids) and
then printed as Python would print it; the exit code is the script's.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from elastic import config, failpoints, session
from elastic.errors import ConfigError


def run_worker(request: dict[str, Any], progress_fd: int) -> int:
    """Run one script to its end and return the exit code.

    `request` holds `env` (the whole environment), `argv` (script and arguments), `module` (whether argv[0] names a
    module) and `cwd`.
    """
    config.replace_environment({**request["env"], config.ENV_PROGRESS_FD: str(progress_fd)})
    failpoints.read_environment()
    os.chdir(request["cwd"])
    name, *arguments = request["argv"]
    sys.argv = [name, *arguments]
    if request["module"]:
        sys.path.insert(0, request["cwd"])
    else:
        sys.path.insert(0, str(Path(name).resolve().parent))
    code = _run(name, as_module=request["module"])
    atexit._run_exitfuncs()
    return code


def _run(name: str, *, as_module: bool) -> int:
    try:
        if as_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
        session.close_current()
    except SystemExit as end:
        if end.code in (None, 0):
            session.close_current()
            return 0
        if not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
            session.report_failure(end, f"SystemExit: {end.code}")
            return 1
        session.report_failure(end, f"SystemExit: {end.code}")
        return end.code
    except Exception as raised:
        error = _explained(raised)
        session.report_failure(error, f"{type(error).__name__}: {error}")
        if isinstance(error, ConfigError):
            print(f"elastic: {error}", file=sys.stderr)  # it says what to change; where it was raised would not help
        else:
            traceback.print_exc()
        return 1
    except BaseException as error:
        session.report_failure(error, f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return 1
    return 0


def _explained(error: Exception) -> Exception:
    """Say what to do where a script relies on a process group that torchrun's workers would have."""
    if "Default process group has not been initialized" in str(error) or "MASTER_ADDR expected" in str(error):
        return ConfigError(
            "the script calls torch.distributed, and the job's workers have no default process group there, since their world "
            "changes: use session.mean() in place of an all-reduce and session.is_main in place of a rank, or make a process "
            "group of your own with an explicit store"
        )
    return error
