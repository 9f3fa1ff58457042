"""The house keeps its rules, and each rule is seen to bite on a small made-up house that breaks it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.house import rules
from tests.house.rules import Check

# What breaks a rule, and what must be said of it.
BROKEN: dict[Check, list[tuple[dict[str, str], str]]] = {
    rules.arrows_point_down: [
        ({"agent/a.py": "import controller.b"}, "agent/a.py:1: agent imports controller.b, but may"),
        ({"recovery/a.py": "from monitoring import x"}, "recovery imports monitoring.x"),
        ({"elastic/a.py": "def f():\n  import agent"}, "elastic/a.py:2: elastic imports agent"),
        ({"elastic/a.py": "import importlib\nimportlib.import_module('agent.b')"}, "elastic imports agent.b"),
        ({"controller/a.py": "import tests.helpers"}, "controller imports tests.helpers"),
    ],
    rules.no_import_circles: [
        (
            {"elastic/a.py": "from elastic import b", "elastic/b.py": "x = 1\nfrom .a import y"},
            "elastic/a.py:1 -> elastic/b.py:2 -> elastic/a.py: an import circle",
        ),
        (
            {
                "agent/a.py": "from agent.b import T",
                "agent/b.py": "if TYPE_CHECKING:\n  from agent.a import U",
            },
            "agent/a.py:1 -> agent/b.py:2 -> agent/a.py: an import circle",
        ),
        (
            {"elastic/__init__.py": "from elastic.a import x", "elastic/a.py": "import elastic"},
            "elastic/__init__.py:1 -> elastic/a.py:1 -> elastic/__init__.py: an import circle",
        ),
        (
            {
                "agent/a.py": "from agent import b",
                "agent/b.py": "import agent.c",
                "agent/c.py": "import agent.b",
            },
            "agent/b.py:1 -> agent/c.py:1 -> agent/b.py: an import circle",
        ),
    ],
    rules.machines_are_pure: [
        ({"agent/machine.py": "from time import monotonic"}, "agent/machine.py:1: a pure file imports time"),
        ({"recovery/sub/a.py": "import os.path"}, "a pure file imports os.path"),
        ({"monitoring/a.py": "x = 1\nprint(x)"}, "monitoring/a.py:2: a pure file calls print()"),
        ({"recovery/a.py": "import numpy as np\nnp.random.rand()"}, "calls numpy.random.rand()"),
        ({"recovery/a.py": "def f(path):\n  return path.read_text()"}, "calls path.read_text()"),
    ],
    rules.one_reader_of_the_environment: [
        ({"agent/a.py": "import os as o\no.environ['X']"}, "agent/a.py:2: os.environ outside"),
        ({"agent/a.py": "from os import getenv as g\ng('X')"}, "agent/a.py:2: os.getenv outside"),
    ],
    rules.no_error_is_swallowed: [
        ({"agent/a.py": "try: f()\nexcept: raise"}, "agent/a.py:2: `except:` hides every error"),
        ({"tests/a.py": "try: f()\nexcept (OSError, Exception) as e: pass"}, "hides every error"),
        (
            {"agent/a.py": "import contextlib as c\nwith c.suppress(Exception): f()"},
            "agent/a.py:2: `c.suppress",
        ),
    ],
    rules.nothing_is_unpickled: [
        ({"agent/a.py": "import pickle"}, "agent/a.py:1: import of pickle"),
        ({"elastic/a.py": "from torch import load\nload('x')"}, "elastic/a.py:2: torch.load"),
        ({"elastic/a.py": "eval('1')"}, "elastic/a.py:1: eval"),
        ({"elastic/a.py": "import torch.distributed as d\nd.all_gather_object([], 1)"}, "all_gather_object"),
        ({"elastic/a.py": "import numpy as np\nnp.load('x', allow_pickle=True)"}, "allow_pickle"),
    ],
    rules.public_modules_have_docstrings: [
        ({"agent/a.py": "x = 1"}, "agent/a.py:1: no module docstring"),
        ({"agent/__init__.py": "x = 1"}, "agent/__init__.py:1: no module docstring"),
    ],
    rules.imports_are_declared: [
        ({"agent/a.py": "import sklearn.svm"}, "sklearn.svm is in no dependency"),
    ],
}

# What looks like a breach and is none.
SOUND: dict[Check, list[dict[str, str]]] = {
    rules.arrows_point_down: [{"controller/a.py": "import recovery\nfrom . import b\nimport elastic.c, os"}],
    rules.no_import_circles: [
        {
            "elastic/__init__.py": "from elastic.a import x",
            "elastic/a.py": "from elastic import b, c",
            "elastic/b.py": "from elastic import c",
            "elastic/c.py": "import os",
        }
    ],
    rules.machines_are_pure: [
        {"agent/shell.py": "import time\nprint(time.time())"},
        {"recovery/isal.py": "import torch"},  # a named exception in a folder of pure files
        {"agent/machine.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import torch"},
    ],
    rules.one_reader_of_the_environment: [{"elastic/config.py": "import os\nos.environ['X']"}],
    rules.no_error_is_swallowed: [
        {"agent/a.py": "try: f()\nexcept OSError: pass"},
        {"agent/a.py": "try: f()\nexcept Exception as e: log(e)"},
    ],
    rules.nothing_is_unpickled: [{"elastic/a.py": "model.eval()\nmodel.load_state_dict(d)"}],
    rules.public_modules_have_docstrings: [
        {"agent/_a.py": "x = 1", "agent/b/__init__.py": "", "tests/a.py": "x = 1"}
    ],
    rules.imports_are_declared: [{"agent/a.py": "import grpc.aio, os\nfrom google.protobuf import message"}],
}


@pytest.mark.parametrize("check", rules.CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rules(check: Check) -> None:
    complaints = check(rules.house())
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("check", rules.CHECKS, ids=lambda check: check.__name__)
def test_each_rule_bites_what_breaks_it_and_nothing_else(check: Check) -> None:
    for made_up, said in BROKEN[check]:
        assert said in "\n".join(check(rules.parse(made_up)))
    for made_up in SOUND[check]:
        assert check(rules.parse(made_up)) == []


def test_every_file_parses() -> None:
    for path, text in rules.sources().items():
        ast.parse(text, path)


def test_every_exception_to_a_rule_is_still_needed() -> None:
    stale = [
        f"MAY_READ_ENVIRONMENT: {path} no longer touches the environment; take it off the list"
        for path in rules.MAY_READ_ENVIRONMENT.keys() & rules.house().keys()
        if not any(name in rules.ENVIRONMENT for _, name in rules.names(rules.house()[path]))
    ]
    stale += [
        f"NOT_PURE: {path} is pure by now, or gone; take it off the list"
        for path in rules.NOT_PURE
        if not any(dotted.split(".")[0] in rules.IMPURE_MODULES for dotted in imported_by(path))
        and not any(name.split(".")[-1] in rules.IMPURE_METHODS for _, name in rules.calls(rules.house()[path]))
    ]
    assert not stale, "\n" + "\n".join(stale)


def imported_by(path: str) -> list[str]:
    """What a file of the house imports; nothing, if there is no such file."""
    file = rules.house().get(path)
    return [dotted for _, dotted in rules.imports(file)] if file else []


def test_every_package_folder_is_in_pyproject() -> None:
    packages = {}
    for path in (*rules.house(), "elastic/v1/runtime_pb2.py"):
        folder, _, _ = path.rpartition("/")
        if path.split("/")[0] in rules.ROOMS:
            installed = folder if folder.split("/")[0] == "elastic" else f"elastic/_daemons/{folder}"
            packages[installed.replace("/", ".")] = folder
    listed = rules.pyproject()["tool"]["setuptools"]["packages"]
    complaints = [
        f"{folder}/: not in the wheel; add {package!r} to [tool.setuptools] packages in pyproject.toml"
        for package, folder in packages.items()
        if package not in listed
    ]
    complaints += [
        f"{folder}/: Python files without __init__.py; add one with a docstring"
        for folder in packages.values()
        if not (rules.ROOT / folder / "__init__.py").exists()
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_every_package_in_pyproject_has_its_folder() -> None:
    setuptools = rules.pyproject()["tool"]["setuptools"]
    gone = [
        f"pyproject.toml: {package!r} has no folder; take it off [tool.setuptools] packages"
        for package in setuptools["packages"]
        if not (rules.ROOT / package.removeprefix("elastic._daemons.").replace(".", "/")).is_dir()
    ]
    assert not gone, "\n" + "\n".join(gone)


def test_the_compiled_contracts_are_what_the_contracts_say() -> None:
    done = subprocess.run(
        [sys.executable, str(rules.ROOT / "proto/generate.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [[], ["worker"], ["../agent"]], ids=str)
def test_the_launcher_refuses_a_name_that_is_no_daemon(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(rules.ROOT / "elastic/launch.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "controller, agent, keeper, checkpointer, doctor" in done.stderr
