"""Compile the contracts of proto/elastic/v1 into elastic/v1: messages, services and their types.

    python proto/generate.py            write what has changed
    python proto/generate.py --check    write nothing; exit 1 if the committed code has drifted

The output depends on the versions of grpcio-tools and mypy-protobuf, so pyproject.toml pins both.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PACKAGE = Path(
    "elastic/v1"
)  # the same below proto/ and below the root: generated imports say `from elastic.v1`
COMMITTED = HERE.parent / PACKAGE
TOOLS = ("grpcio-tools", "mypy-protobuf")


def compile_contracts(out: Path) -> None:
    """Compile every contract below `out`; protoc has said what is wrong before SystemExit is raised."""
    contracts = sorted(str(path) for path in (HERE / PACKAGE).glob("*.proto"))
    if not contracts:
        raise SystemExit(f"proto/generate.py: no contract in proto/{PACKAGE}: is this the whole checkout?")
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(["protoc", f"-I{HERE}", f"-I{well_known}", *plugins, *outputs, *contracts])
    if status:
        raise SystemExit(
            f"proto/generate.py: protoc refused the contracts (exit {status}), for the reason above"
        )


def generated(folder: Path) -> dict[str, bytes]:
    """Name and content of each generated file in `folder`."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_pb2*.py*"))}


def main() -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on a difference")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as temporary:
        compile_contracts(Path(temporary))
        wanted = generated(Path(temporary) / PACKAGE)
    found = generated(COMMITTED)
    drifted = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if check and drifted:
        tools = ", ".join(f"{tool} {version(tool)}" for tool in TOOLS)
        files = ", ".join(f"{PACKAGE}/{name}" for name in drifted)
        print(
            f"{files}: not what proto/{PACKAGE} compiles to with {tools}; run `make proto`", file=sys.stderr
        )
        return 1
    for name in [] if check else drifted:
        if name in wanted:
            COMMITTED.mkdir(parents=True, exist_ok=True)
            (COMMITTED / name).write_bytes(wanted[name])
        else:
            (COMMITTED / name).unlink()
        print(f"{'wrote' if name in wanted else 'removed'} {PACKAGE}/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
