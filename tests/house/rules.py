"""The house rules: what every file must keep, read off its syntax tree. Nothing of ours is imported here.

A check is a function from files to complaints. A complaint says `file:line: what is wrong; what to do`.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("elastic", "agent", "controller", "recovery", "monitoring")
OUTSIDE = ("benchmarks", "examples", "tests")
GENERATED = "elastic/v1/*_pb2*.py"

# Who may import whom. Tests stand above everything; an example sees what a user sees.
MAY_IMPORT = {
    "elastic": {"elastic"},
    "recovery": {"elastic", "recovery"},
    "monitoring": {"elastic", "monitoring"},
    "agent": {"elastic", "recovery", "monitoring", "agent"},
    "controller": {"elastic", "recovery", "monitoring", "controller"},
    "examples": {"elastic", "examples"},
    "benchmarks": {*ROOMS, "benchmarks", "examples"},  # what is measured is what the examples train
    "tests": {*ROOMS, *OUTSIDE},
}

# Pure files: what they decide depends on their arguments alone.
PURE = (
    "agent/events.py",
    "agent/machine.py",
    "agent/protection.py",
    "agent/rotation.py",
    "agent/tables.py",
    "controller/accounting.py",
    "controller/attempts.py",
    "controller/commits.py",
    "controller/endings.py",
    "controller/events.py",
    "controller/fencing.py",
    "controller/founding.py",
    "controller/incidents.py",
    "controller/inquiring.py",
    "controller/job.py",
    "controller/layouts.py",
    "controller/links.py",
    "controller/losses.py",
    "controller/machine.py",
    "controller/metrics.py",
    "controller/nodes.py",
    "controller/places.py",
    "controller/probing.py",
    "controller/recovering.py",
    "controller/state.py",
    "controller/straggling.py",
    "controller/switching.py",
    "controller/views.py",
    "controller/workers.py",
    "elastic/domain.py",
    "elastic/folds.py",
    "elastic/pipeline/actions.py",
    "elastic/pipeline/moves.py",
    "elastic/protocol.py",
    "elastic/sampler.py",
    "elastic/sync/advice.py",
    "elastic/sync/deals.py",
    "elastic/sync/pairs.py",
    "monitoring/*",
    "recovery/*",
)
NOT_PURE: dict[str, str] = {  # in a folder of pure files, each with its reason
    "monitoring/dashboards.py": "a program that writes the dashboards",
    "monitoring/exporter.py": "answers Prometheus over HTTP",
    "recovery/choosing.py": "tries the engines of the erasure code on tensors",
    "recovery/codec.py": "works in place on the caller's tensors; as a program it measures and prints",
    "recovery/engines.py": "works in place on the caller's tensors",
    "recovery/isal.py": "calls a foreign library",
}
IMPURE_MODULES = {
    *("datetime", "locale", "platform", "random", "secrets", "time", "uuid"),
    *("glob", "io", "logging", "os", "psutil", "shutil", "sqlite3", "subprocess", "tempfile"),
    *("asyncio", "concurrent", "multiprocessing", "queue", "select", "selectors", "threading"),
    *("grpc", "http", "socket", "ssl", "torch", "urllib", "zmq"),
}
IMPURE_CALLS = {"open", "print", "input", "breakpoint", "signal.signal", "signal.raise_signal"}
IMPURE_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes"}

# Files that touch the environment, each with its reason.
ENVIRONMENT = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")
MAY_READ_ENVIRONMENT: dict[str, str] = {
    "elastic/config.py": "the one reader: flags > environment > file > default",
}

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EXECUTORS = {"eval", "exec", "torch.load", "torch.save", "torch.hub.load"}
OBJECT_COLLECTIVES = {  # they pickle what they carry
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}

# Dependencies that are named otherwise than what they provide; and imports that no dependency provides, each
# with how the file does without it.
PROVIDED_AS = {"google": "protobuf", "grpc": "grpcio", "prometheus_client": "prometheus-client", "yaml": "pyyaml", "zmq": "pyzmq"}
OPTIONAL_IMPORTS: dict[str, str] = {
    "grafana_foundation_sdk": "makes the dashboards, which are checked in; nothing that runs imports it",
    "fsspec": "imported only for a target with an address instead of a path, with a sentence where it is missing",
    "numpy": "imported only inside functions that are reached when the script itself brought numpy in",
}


# ----------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class File:
    """One Python file of the tree: its path below the root (with slashes) and its syntax tree."""

    path: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The top folder."""
        return self.path.split("/")[0]

    @property
    def package(self) -> list[str]:
        """The dotted package in which relative imports start, in parts."""
        return self.path.split("/")[:-1]


House = Mapping[str, File]
Check = Callable[[House], list[str]]


def parse(sources: Mapping[str, str]) -> House:
    """The house made of these files. One that does not parse is left out; a test of its own names it."""
    house = {}
    for path, text in sources.items():
        try:
            house[path] = File(path, ast.parse(text, path))
        except SyntaxError:
            continue
    return house


@cache
def sources() -> dict[str, str]:
    """Every Python file of ours that was written by hand."""
    found = {}
    for top in (*ROOMS, *OUTSIDE):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not fnmatch(name, GENERATED):
                found[name] = path.read_text()
    return found


@cache
def house() -> House:
    return parse(sources())


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_name(requirement: str) -> str:
    """`grpcio` of `grpcio>=1.85.1`."""
    return requirement.split(";")[0].split("[")[0].rstrip(" 0123456789.<>=!~,")


def rooms(house: House) -> Iterator[File]:
    """The files of the five rooms."""
    return (file for file in house.values() if file.room in ROOMS)


def imports(file: File, *, typing_only: bool = True) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of each import anywhere in the file, also by `import_module("name")`.

    `from a import b` gives `a.b`. With `typing_only=False`, those under `if TYPE_CHECKING:` are left out.
    """
    skipped: set[ast.AST] = set()
    if not typing_only:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
                skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(file.tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = file.package[: len(file.package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func).split(".")[-1]
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def names(file: File) -> Iterator[tuple[ast.expr, str]]:
    """Each name and attribute chain in use, spelt out: with `import os as o`, `o.environ` is `os.environ`."""
    known: dict[str, str] = {}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            known |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield node, ".".join([known.get(inner.id, inner.id), *reversed(parts)])


def calls(file: File) -> Iterator[tuple[ast.Call, str]]:
    """Each call of a name or an attribute chain, with that name spelt out."""
    spelt = dict(names(file))
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and node.func in spelt:
            yield node, spelt[node.func]


def target(house: House, dotted: str) -> str | None:
    """The file that an import of `dotted` reads: the module itself, or the one that defines the name."""
    for name in (dotted, dotted.rpartition(".")[0]):
        stem = name.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in house:
                return path
    return None


def is_pure(path: str) -> bool:
    return path not in NOT_PURE and any(fnmatch(path, pattern) for pattern in PURE)


# ----------------------------------------------------------------------------------------------------
# Checks


def arrows_point_down(house: House) -> list[str]:
    return [
        f"{file.path}:{line}: {file.room} imports {dotted}, but may import only "
        f"{', '.join(sorted(MAY_IMPORT[file.room]))}; move what both need down into elastic, or pass it in"
        for file in house.values()
        for line, dotted in imports(file)
        if dotted.split(".")[0] in MAY_IMPORT.keys() - MAY_IMPORT[file.room]
    ]


def no_import_circles(house: House) -> list[str]:
    """Imports under TYPE_CHECKING and inside functions count too: they hide a circle, they do not open it."""
    edges: dict[str, dict[str, int]] = {path: {} for path in house}
    for file in house.values():
        for line, dotted in imports(file):
            path = target(house, dotted)
            if path is not None:
                edges[file.path].setdefault(path, line)
    complaints, told = [], set()
    for start in edges:
        circle = shortest_circle(edges, start)
        if circle and told.isdisjoint(circle):
            told.update(circle)
            steps = [f"{here}:{edges[here][there]}" for here, there in pairwise(circle)]
            complaints.append(
                f"{' -> '.join(steps)} -> {start}: an import circle; "
                "move what they share into a file below them, or pass it in"
            )
    return complaints


def shortest_circle(edges: Mapping[str, Mapping[str, int]], start: str) -> list[str]:
    """The files on the shortest way from `start` back to itself, it at both ends; empty if there is none."""
    came_from: dict[str, str] = {}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        for there in edges[here]:
            if there == start:
                way = [start, here]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return way[::-1]
            if there not in came_from:
                came_from[there] = here
                queue.append(there)
    return []


def machines_are_pure(house: House) -> list[str]:
    remedy = "let the shell do it and pass the result in as an argument or an event"
    complaints = []
    for file in house.values():
        if not is_pure(file.path):
            continue
        for line, dotted in imports(file, typing_only=False):
            if dotted.split(".")[0] in IMPURE_MODULES:
                complaints.append(f"{file.path}:{line}: a pure file imports {dotted}; {remedy}")
        for call, name in calls(file):
            method = name.split(".")[-1]
            if name in IMPURE_CALLS or method in IMPURE_METHODS or name.startswith("numpy.random."):
                complaints.append(f"{file.path}:{call.lineno}: a pure file calls {name}(); {remedy}")
    return complaints


def one_reader_of_the_environment(house: House) -> list[str]:
    return [
        f"{file.path}:{node.lineno}: {name} outside elastic/config.py; take the value from a config object, "
        "or name this file and its reason in MAY_READ_ENVIRONMENT (tests/house/rules.py)"
        for file in rooms(house)
        if file.path not in MAY_READ_ENVIRONMENT
        for node, name in names(file)
        if name in ENVIRONMENT
    ]


def no_error_is_swallowed(house: House) -> list[str]:
    remedy = "name the errors that are expected, and act on them or say why nothing is to be done"
    broad = {"Exception", "BaseException"}
    complaints = []
    for file in house.values():
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = {ast.unparse(e) for e in getattr(node.type, "elts", [node.type])} if node.type else broad
            silent = all(
                isinstance(s, ast.Pass | ast.Continue)
                or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            if node.type is None or (silent and caught & broad):
                written = ast.unparse(node).splitlines()[0]
                complaints.append(f"{file.path}:{node.lineno}: `{written}` hides every error; {remedy}")
        for call, name in calls(file):
            if name == "contextlib.suppress" and broad & {ast.unparse(argument) for argument in call.args}:
                complaints.append(
                    f"{file.path}:{call.lineno}: `{ast.unparse(call)}` hides every error; {remedy}"
                )
    return complaints


def nothing_is_unpickled(house: House) -> list[str]:
    remedy = "bytes become code this way: send raw bytes with a manifest, or a protobuf message"
    complaints = []
    for file in rooms(house):
        for line, dotted in imports(file):
            if dotted.split(".")[0] in UNPICKLERS:
                complaints.append(f"{file.path}:{line}: import of {dotted}; {remedy}")
        for node, name in names(file):
            if name in EXECUTORS or name.split(".")[-1] in OBJECT_COLLECTIVES:
                complaints.append(f"{file.path}:{node.lineno}: {name}; {remedy}")
        for call, name in calls(file):
            if any(keyword.arg == "allow_pickle" for keyword in call.keywords):
                complaints.append(f"{file.path}:{call.lineno}: {name}(allow_pickle=...); {remedy}")
    return complaints


def public_modules_have_docstrings(house: House) -> list[str]:
    return [
        f"{file.path}:1: no module docstring; say what the file is for and what it must never do"
        for file in rooms(house)
        if file.tree.body and not ast.get_docstring(file.tree)
        if not (name := file.path.split("/")[-1]).startswith("_") or name.startswith("__")
    ]


def imports_are_declared(house: House) -> list[str]:
    declared = {requirement_name(line) for line in pyproject()["project"]["dependencies"]}
    return [
        f"{file.path}:{line}: {dotted} is in no dependency of pyproject.toml; add it there, "
        "or name it in OPTIONAL_IMPORTS with how the file does without it (tests/house/rules.py)"
        for file in rooms(house)
        for line, dotted in imports(file)
        if (top := dotted.split(".")[0]) not in {*sys.stdlib_module_names, *MAY_IMPORT, *OPTIONAL_IMPORTS}
        if PROVIDED_AS.get(top, top) not in declared
    ]


CHECKS: tuple[Check, ...] = (
    arrows_point_down,
    no_import_circles,
    machines_are_pure,
    one_reader_of_the_environment,
    no_error_is_swallowed,
    nothing_is_unpickled,
    public_modules_have_docstrings,
    imports_are_declared,
)
