"""The wheel in an empty environment: a forbidden import works in a checkout and breaks here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from tests.house.rules import ROOMS, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NOT_SHIPPED = shutil.ignore_patterns("__pycache__", ".*")

# What a user's script must find, and must not. It is a program by itself: nothing of this file is in it.
SCRIPT = """
    import importlib.util
    import json
    import sys

    import elastic

    seen = {
        "elastic": elastic.__file__,
        "visible": [name for name in ROOMS if importlib.util.find_spec(name) is not None],
        "path": sys.path,
        "arguments": sys.argv[1:],
    }
    with open("seen.json", "w") as file:
        json.dump(seen, file)
"""


def run(*command: str | Path, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run in a neutral environment; past the deadline, kill the process group and fail with what it said.

    Output goes to files: an orphan that outlives the group would hold a pipe open for ever.
    """
    ours = ("ELASTIC", "PYTHON", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=environment | {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        late = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read())
    if late:
        pytest.fail(f"{process.args} did not end within {timeout_s} s:\n{said[0]}\n{said[1]}")
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what is shipped, so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=NOT_SHIPPED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    done = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("elastic_runtime-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, which sees the dependencies here but not the checkout."""
    home = tmp_path_factory.mktemp("environment")
    done = run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", home / "bin/python")
    done = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    # A .pth file adds folders but reads no .pth file in them: an editable install there stays unseen.
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own,) = home.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(sorted(outer)) + "\n")
    return home / "bin"


def test_the_wheel_holds_every_file_of_the_rooms(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    missing = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            hidden = any(part.startswith((".", "__pycache__")) for part in name.split("/"))
            if path.is_file() and not hidden:
                inside = name if room == "elastic" else f"elastic/_daemons/{name}"
                if inside not in shipped:
                    missing.append(
                        f"{name}: not in the wheel; see packages and package-data in pyproject.toml"
                    )
    assert not missing, "\n" + "\n".join(missing)


def test_the_wheel_puts_nothing_but_elastic_on_the_path(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"elastic"}


@pytest.mark.parametrize("name", [*(room for room in ROOMS if room != "elastic"), "proto"])
def test_a_daemons_folder_cannot_be_imported(installed: Path, tmp_path: Path, name: str) -> None:
    done = run(installed / "python", "-c", f"import {name}", cwd=tmp_path)
    assert done.returncode == 1
    assert f"No module named '{name}'" in done.stderr


def test_elastic_is_the_installed_one(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "python", "-c", "import elastic; print(elastic.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed.parent)


def test_the_command_says_what_it_can_do(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "elastic", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout


@pytest.mark.e2e
def test_a_job_runs_from_the_wheel_and_its_script_sees_only_elastic(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"ROOMS = {ROOMS[1:]!r}\n" + textwrap.dedent(SCRIPT))
    done = run(
        installed / "elastic", "run", "--nproc-per-node", "1", "script.py", "--epochs", "3", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["visible"] == [], "a user's own module of that name would be shadowed"
    assert Path(seen["elastic"]).is_relative_to(installed.parent)
    assert not [entry for entry in seen["path"] if "_daemons" in entry or Path(entry) == ROOT]
    assert seen["arguments"] == ["--epochs", "3"]
