"""What a code leaves out of what a slot sends is sent with the slot's next: error feedback.

A slot's errors stay with the worker that computes it, and are those of the newest committed step: what is computed again after a
loss begins with the same ones. They are lost with the worker, or when the slot is dealt to another one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from elastic.quantize import Code, decode, encode


class ErrorFeedback:
    """The errors of this worker's slots, in the layout of a reducer's buckets.

    Attributes:
        pauses: what slots send at present has another scale than errors have, which wait.
    """

    def __init__(self, code: Code) -> None:
        self._code = code
        self._errors: dict[int, list[Tensor]] = {}
        self._new: dict[int, list[Tensor]] = {}
        self.pauses = False

    def add(self, slot: int, buckets: Sequence[Tensor]) -> None:
        """Add a slot's errors to what it is about to send, in place, and note which will be left out then."""
        if self.pauses:
            return
        for error, bucket in zip(self._errors.get(slot, ()), buckets, strict=False):
            bucket.add_(error)
        self._new[slot] = [
            bucket - decode(self._code, encode(self._code, bucket), bucket.numel()).to(bucket.dtype) for bucket in buckets
        ]

    def commit(self) -> None:
        """The step is committed: its errors are those that count."""
        self._errors |= self._new
        self._new = {}

    def keep(self, slots: Collection[int]) -> None:
        """Forget the errors of slots that are not this worker's; with none, of all."""
        self._errors = {slot: errors for slot, errors in self._errors.items() if slot in slots}
        self._new = {slot: errors for slot, errors in self._new.items() if slot in slots}
