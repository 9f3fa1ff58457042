"""Where Intel's ISA-L may be found: it carries checksums and the erasure code at memory speed.

Whoever loads it tests it before trusting it, and does without it where it cannot be loaded. This file must never
import torch: daemons compute checksums too.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

SYSTEM_LIBRARY = "libisal.so.2"


def libraries() -> list[str]:
    """Where ISA-L may be, best first: inside the wheel of pyeclib, then wherever the system has it."""
    spec = find_spec("pyeclib")
    if spec is None or spec.origin is None:
        return [SYSTEM_LIBRARY]
    beside = Path(spec.origin).parent.parent / "pyeclib.libs"
    return [*sorted(str(path) for path in beside.glob("libisal*.so*")), SYSTEM_LIBRARY]
