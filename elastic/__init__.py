"""elastic: a PyTorch training job that does not stop.

A controller and one agent per node keep workers training through failures, preemptions and changes of size. A script
calls `join()`, hands model, optimizer, loader and scheduler to `session.prepare()`, and trains as it always did.
This package is all that enters a training process; the daemons live elsewhere.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from elastic import sync
    from elastic.session import Session, join

__all__ = ["Session", "__version__", "join", "sync"]


def __getattr__(name: str) -> Any:
    # Daemons import this package too, and must not pay for torch.
    if name == "sync":
        return importlib.import_module("elastic.sync")
    if name in ("Session", "join"):
        from elastic import session

        return getattr(session, name)
    raise AttributeError(f"module 'elastic' has no attribute {name!r}")
