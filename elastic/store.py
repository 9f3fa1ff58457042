"""The worker's side of the rendezvous store: a `torch.distributed.Store` over the agent's local API.

Unlike TCPStore every operation has a deadline, belongs to one generation, and can be cancelled from another thread.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import grpc
from torch._C._distributed_c10d import Store

from elastic.domain import Plan
from elastic.errors import BuildCancelled, CollectiveAborted
from elastic.v1 import runtime_pb2, runtime_pb2_grpc


class RendezvousStore(Store):
    """Addresses of one generation's workers.

    gloo asks for one key after another and needs all of them; they are fetched together, in one waiting call.

    Raises (from every operation):
        BuildCancelled: the generation was replaced by a newer one.
        CollectiveAborted: the deadline passed or the store's node did not answer.
    """

    def __init__(self, channel: grpc.Channel, plan: Plan, timeout_s: float) -> None:
        super().__init__()
        self._stub = runtime_pb2_grpc.StoreStub(channel)
        self._plan = plan
        self._deadline = time.monotonic() + timeout_s
        self._values: dict[str, bytes] = {}
        self._calls: set[Any] = set()
        self._lock = threading.Lock()
        self._cancelled = ""

    def cancel(self, reason: str) -> None:
        """Make every operation, begun or to come, raise BuildCancelled. From any thread."""
        with self._lock:
            self._cancelled = reason
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        self._call(
            self._stub.Set,
            runtime_pb2.StoreSetRequest(
                key=runtime_pb2.StoreKey(generation=self._plan.generation, key=key),
                value=data,
                node=self._plan.store_node,
                address=self._plan.store_address,
            ),
        )

    def get(self, key: str) -> bytes:
        self._fetch(key)
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._fetch(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        raise CollectiveAborted(f"the rendezvous store has no counters (key {key!r})")

    def _fetch(self, key: str) -> None:
        if key in self._values:
            return
        prefix, _, last = key.rpartition("/")
        keys = [key]
        if last.isdigit() and int(last) < self._plan.world_size:
            keys = [f"{prefix}/{rank}" for rank in range(self._plan.world_size)]
        wanted = [k for k in keys if k not in self._values]
        reply = self._call(
            self._stub.Get,
            runtime_pb2.StoreGetRequest(
                generation=self._plan.generation,
                keys=wanted,
                node=self._plan.store_node,
                address=self._plan.store_address,
            ),
        )
        self._values.update(zip(wanted, reply.values, strict=True))

    def _call(self, method: Any, request: object) -> Any:
        with self._lock:
            self._check_cancelled()
            call = method.future(request, timeout=max(0.001, self._deadline - time.monotonic()))
            self._calls.add(call)
        try:
            return call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            self._check_cancelled()
            code = error.code() if isinstance(error, grpc.Call) else None
            if code is grpc.StatusCode.FAILED_PRECONDITION:
                raise BuildCancelled(f"generation {self._plan.generation} has been replaced") from error
            raise CollectiveAborted(
                f"the rendezvous of generation {self._plan.generation} failed: "
                f"{code.name if code is not None else error}"
            ) from error
        finally:
            with self._lock:
                self._calls.discard(call)

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise BuildCancelled(f"generation {self._plan.generation}: {self._cancelled}")
