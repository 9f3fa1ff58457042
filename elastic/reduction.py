"""From the gradients of slots to the gradient of a step: the worker's half of the reduction.

Autograd hands each gradient over as soon as it is complete; it is added to the partial sum of its term and
taken out of `p.grad`, so that nothing a user does to `p.grad` inside a slot can change the order of a sum.
Once every slot is finished, the partial sums are exchanged into one output, whose views become `p.grad`. A
partial sum is never written by a reduction, so that after an abort a new world goes on from the finished
slots. With one term for each worker this is two gradient-sized sets of memory, and nothing more. The file
must never let an exception out of a hook into the user's backward pass, and must never make an addition
whose place depends on timing.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from elastic.coded import CodedExchange
from elastic.errors import CollectiveAborted
from elastic.exchange import Alone, Exchange, Lane, OrderedExchange
from elastic.feedback import ErrorFeedback
from elastic.flat import Layout, is_finite
from elastic.folds import Fold, plan_fold, plan_shares
from elastic.group import Messages
from elastic.partials import Partial, PartialSums
from elastic.quantize import Code
from elastic.shared import Neighbours

BUCKET_BYTES = 25 * 1024 * 1024


class Reduction(enum.StrEnum):
    """How the sum of a step is ordered."""

    ORDERED = "ordered"
    """By slots: the same bits in every world."""
    FAST = "fast"
    """By workers: the least to add and to send, also after a loss."""


@dataclass(frozen=True)
class Reduced:
    """What `Reducer.finish` knows about a step.

    Attributes:
        finite: whether this rank's chunks of the gradient are. The verdict asks all ranks.
        complete: whether every gradient of this rank is in the sum. If not, the step has to be reduced again:
            `plan`, and then whatever `remaining_slots` names.
        extras: the folded extras, float64, the same bits on every rank.
    """

    finite: bool
    complete: bool
    extras: torch.Tensor


class _Taken(enum.IntEnum):
    """What happened to a parameter's gradient in the present slot."""

    NOT_YET = 0
    COPIED = 1  # it is the only content of the partial sum: more may be added to it
    ADDED = 2  # it is inside a sum: more of the same slot can no longer be added in the right order


class Reducer:
    """Owns the gradient memory of some parameters, and turns the gradients of slots into that of a step.

    A step is: `plan` (when the world, the assignment or the empty slots change), then for each of
    `remaining_slots` `begin_slot`, the user's forward and backward, `end_slot`; then `finish`, the verdict,
    `install`, the optimizer, and `clear`. Before the backward of the last slot `arm` lets the exchange begin
    inside it. All of it happens on one thread; only the group may be aborted from another.

    Within a slot `p.grad` is None except inside the backward pass: gradients are taken away as they come,
    all of them are added up, and what the user leaves in `p.grad` is added at `end_slot`.

    Args:
        parameters: the same, in the same order, on every worker; each requires a gradient.
        replicas: V, the number of virtual replicas.
        reduction: how the sum is ordered.
        extras: length of the float64 vector that is folded in the order of the gradients.
        bucket_bytes: the size of the pieces that are exchanged as wholes.
        shared: whether other workers of this node read the sums instead of receiving them; alike on all of them.
        on_progress: called for each gradient that comes.
        in_place: autograd adds to the partial sums by itself, without a call for each gradient, once a slot has shown
            that each gradient comes in one piece. Then no exchange can begin inside a backward (`arm`).
        code: in which gradients are exchanged, if each slot is a virtual replica and `reduction` is ORDERED; None: as they are.
        feedback: what that code leaves out of each slot; None: it is lost.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        replicas: int,
        reduction: Reduction = Reduction.ORDERED,
        extras: int = 0,
        bucket_bytes: int = BUCKET_BYTES,
        shared: bool = False,
        on_progress: Callable[[], None] | None = None,
        in_place: bool = False,
        code: Code | None = None,
        feedback: ErrorFeedback | None = None,
    ) -> None:
        self._layout = Layout(parameters, extras, bucket_bytes, shared=shared)
        self._neighbours = Neighbours()
        self._on_progress = on_progress
        self._parameters = self._layout.parameters
        self._buckets = self._layout.buckets
        self._bucket_of = {i: n for n, b in enumerate(self._buckets) for i in b.parameters}
        self._replicas = replicas
        self._reduction = reduction
        self._output = self._layout.allocate()
        self._sums = PartialSums(self._layout, is_ordered=reduction is Reduction.ORDERED)
        self._group: Messages | None = None
        self._fold = Fold((), ())
        self._planned: object = None
        # The present slot.
        self._slot: int | None = None
        self._into: Partial | None = None
        self._taken = [_Taken.NOT_YET] * len(parameters)
        self._weight: float | None = None
        self._tainted = False
        self._failure: Exception | None = None
        # Parameters whose gradient comes in several pieces: they stay in `p.grad` until the end of the slot.
        self._piecewise: set[int] = set()
        self._has_seen_a_slot = False
        self._in_place = in_place
        self._code, self._feedback = code, feedback
        self._is_adding = False  # the sum itself is in `p.grad` during the present slot
        # The exchange of the present step.
        self._exchange: Exchange | None = None
        self._lanes: list[Lane] = []
        self._started = 0
        self._missing: list[int] = []
        self._is_armed = False
        self._spoiled = False
        self._aborted: CollectiveAborted | None = None
        self._weight_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._hooks = [
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                functools.partial(self._on_gradient, i)
            )
            for i, p in enumerate(self._parameters)
        ]

    def plan(self, group: Messages, owners: Sequence[int], empty: Iterable[int] = ()) -> None:
        """Adopt a world and an assignment; may be called at any time outside a slot.

        Partial sums of the present step are kept where their finished slots are the beginning of what this
        rank has to compute now, and dropped otherwise.

        Args:
            group: of the new generation. The old one, if an exchange of it is open, must have been aborted.
            owners: the rank that computes each slot.
            empty: slots of the present step that have no samples.
        """
        self._refuse_inside_a_slot("plan")
        self._close_exchange()
        planned = (group, tuple(owners), frozenset(empty))
        if planned == self._planned:
            return
        if group is not self._group:
            self._neighbours.forget_dead()
        self._planned = planned
        self._group, owners, absent = planned
        if self._reduction is Reduction.ORDERED:
            self._fold = plan_fold(owners, self._replicas, absent, merge=self._code is None)
        else:
            self._fold = plan_shares(owners, absent)
        self._sums.plan(self._fold.owned_by(group.rank))

    def remaining_slots(self) -> tuple[int, ...]:
        """The slots that this rank still has to compute, in the order in which to do it."""
        return self._sums.remaining_slots()

    def begin_slot(self, slot: int | None, weight: float | None = None) -> None:
        """Expect the gradients of a slot.

        Args:
            slot: one of the `remaining_slots`, in their order; None for a throwaway slot, whose gradients
                come and go as if there were no reducer.
            weight: what each of its gradients is multiplied by; None is as good as 1 and costs nothing.

        Raises:
            ValueError: the slot is not this rank's, is finished, or would change the order of its sum.
        """
        self._refuse_inside_a_slot("begin_slot")
        if slot is not None:
            self._into = self._sums.partial_for(slot)
            self._slot = slot
        else:
            self._sums.reserve()  # the first slot that counts then finds its memory ready
        self.weigh(weight)
        self._taken = [_Taken.NOT_YET] * len(self._parameters)
        self._forget_grads()
        if self._into is not None and self._in_place and not self._hooks and all(self._into.present):
            self._is_adding = True
            for parameter, view in zip(self._parameters, self._into.memory.views, strict=True):
                parameter.grad = view

    def weigh(self, weight: float | None) -> None:
        """Multiply the gradients of the present slot by a weight, from now on; None is as good as 1."""
        self._weight = weight
        if weight is not None and not self._weight_hooks:
            self._weight_hooks = [
                p.register_hook(self._weighted)  # type: ignore[no-untyped-call]
                for p in self._parameters
            ]

    def arm(self) -> None:
        """Let the exchange of the step begin inside the next backward pass, if that is the last one here."""
        if self._slot is None or self._in_place or self._size() == 1:
            return
        # Before a first slot was seen nobody knows which gradients come in pieces.
        if self._has_seen_a_slot and self._sums.is_whole_after(self._slot):
            self._is_armed = True
            self._missing = [len(bucket.parameters) for bucket in self._buckets]
            self._open_exchange()

    def end_slot(self, extras: torch.Tensor | None = None) -> bool:
        """Finish the present slot.

        Args:
            extras: the slot's float64 vector, if there is one.

        Returns:
            Whether the slot was kept. If not (pieces of a gradient came in an order that cannot be undone),
            the slots of its partial sum are among `remaining_slots` again, and will succeed the next time.

        Raises:
            Exception: whatever went wrong while gradients were added up; the slot has to be discarded.
        """
        partial, slot = self._into, self._slot
        if partial is None or slot is None:
            raise RuntimeError("There is no slot to end.")
        if not self._is_adding:
            self._take_leftovers(partial)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        if extras is not None:
            if extras.shape != (self._layout.extras,):
                raise ValueError(f"extras of {tuple(extras.shape)} where {self._layout.extras} belong")
            partial.add_extras(extras)
        if self._feedback is not None:
            for bucket in self._buckets:
                partial.complete(bucket)
            gradients = [each for each in zip(partial.memory.buckets, self._buckets, strict=True) if each[1].parameters]
            self._feedback.add(slot, [memory[: bucket.size] for memory, bucket in gradients])
        self._has_seen_a_slot = True
        if self._in_place and self._hooks and not self._piecewise and _Taken.NOT_YET not in self._taken:
            self._take_hooks_off()
        self._leave_slot()
        if self._tainted and not self._started:
            self._tainted = False
            self._sums.drop(partial)
            return False
        # Once a part is on its way peers wait for the rest: let the exchange end, and then do it again.
        self._spoiled = self._tainted
        self._sums.finish_slot(slot, partial)
        return True

    def discard_slot(self) -> None:
        """Forget the present slot: nothing of a throwaway slot, or of one that failed, is kept."""
        partial = self._into
        self._leave_slot()
        if partial is not None:
            self._close_exchange()
            if partial.slots or any(partial.present):
                self._sums.drop(partial)
        self._tainted = False

    def reset_slot(self) -> None:
        """Forget what the present slot has produced: the user zeroed the gradients between two passes."""
        partial = self._into
        if partial is None:
            return
        self._tainted |= self._is_adding
        for index, taken in enumerate(self._taken):
            if taken is not _Taken.NOT_YET:
                self._piecewise.add(index)
            if taken is _Taken.COPIED:
                partial.present[index] = False
                self._taken[index] = _Taken.NOT_YET
            self._tainted |= taken is _Taken.ADDED or self._is_gone(index)
        self._forget_grads()

    def presence(self) -> list[bool]:
        """For each parameter, whether any slot here gave it a gradient."""
        partials = [partial.present for partial in self._sums.totals().values()]
        return [any(flags) for flags in zip(*partials, strict=True)] or [False] * len(self._parameters)

    def presence_after_reduction(self) -> list[bool]:
        """For each parameter, whether any slot of the newest reduced step, anywhere, gave it a gradient."""
        return [count > 0 for count in self._output.presence.tolist()]

    def output(self) -> Sequence[torch.Tensor]:
        """The newest reduced gradient of each parameter; not to be written to before the verdict."""
        return self._output.views

    def output_is_finite(self) -> bool:
        """Whether all of the newest reduced gradient is, as the verdict says if nobody changed it since."""
        pairs = zip(self._output.buckets, self._buckets, strict=True)
        return all(is_finite(memory[: bucket.size]) for memory, bucket in pairs if bucket.parameters)

    def finish(self, divisor: float | Callable[[torch.Tensor], float]) -> Reduced:
        """Complete the sum of the step, divided, in the output.

        Peers may still be reading; nobody changes what it has for the step before the verdict, which tells that all
        have come this far.

        Args:
            divisor: a number, or what makes one out of the folded extras (which then are awaited first).

        Raises:
            CollectiveAborted: a peer is gone; every operation has ended, and the partial sums are as before.
        """
        self._refuse_inside_a_slot("finish")
        if self.remaining_slots() and not self._spoiled:
            raise RuntimeError(f"Slots {self.remaining_slots()} are not finished.")
        try:
            reduced = self._complete_exchange(divisor)
        except BaseException:
            self._close_exchange()
            raise
        self._forget_exchange()
        return reduced

    def pass_on(self, group: Messages, ranks: Iterable[int], tag: int) -> None:
        """Send the newest reduced gradient, with all that travels along, to ranks that `receive` it."""
        for number, (memory, bucket) in enumerate(zip(self._output.buckets, self._buckets, strict=True)):
            whole = memory[: bucket.size].cpu()
            for rank in ranks:
                group.post(whole, rank, tag + number)

    def receive(self, group: Messages, rank: int, tag: int) -> Reduced:
        """Take part in a sum to which this rank has nothing to give: get what another one has. Raises CollectiveAborted."""
        arriving = []
        for number, (memory, bucket) in enumerate(zip(self._output.buckets, self._buckets, strict=True)):
            whole = memory[: bucket.size]
            landed = torch.empty_like(whole, device="cpu")
            arriving.append((group.take(landed, rank, tag + number), landed, whole))
        for work, landed, whole in arriving:
            work.wait()
            whole.copy_(landed)
        return Reduced(self.output_is_finite(), True, self._output.extras.clone())

    def install(self, presence: Sequence[bool]) -> None:
        """Make `p.grad` the reduced gradient, and None where no worker had one.

        Args:
            presence: for each parameter whether any rank had a gradient for it (the verdict knows).
        """
        for parameter, view, present in zip(self._parameters, self._output.views, presence, strict=True):
            parameter.grad = view if present else None

    def clear(self) -> None:
        """Forget the partial sums after a commit: the next step begins, under the same plan."""
        self._refuse_inside_a_slot("clear")
        self._sums.clear()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._take_hooks_off()
        for hook in self._weight_hooks:
            hook.remove()

    def _take_hooks_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # Gradients as they come ---------------------------------------------------------------------------------

    def _on_gradient(self, index: int, parameter: torch.Tensor) -> None:
        """A gradient is complete (called by autograd, inside the user's backward pass)."""
        if self._on_progress is not None:
            self._on_progress()
        if self._into is None or self._failure is not None:
            return
        try:
            if index not in self._piecewise:
                self._take(index, self._into)
                if self._is_armed:
                    self._count_down(self._bucket_of[index])
        except Exception as error:
            self._failure = error

    def _take(self, index: int, partial: Partial) -> None:
        """Move what lies in `p.grad` into the partial sum."""
        parameter = self._parameters[index]
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if gradient.is_sparse:
            self._in_place = False  # its pieces are added up in an order of their own
        taken = self._taken[index]
        if taken is not _Taken.NOT_YET:
            self._piecewise.add(index)
        if taken is _Taken.ADDED or self._is_gone(index):
            self._tainted = True
            return
        if taken is _Taken.NOT_YET:
            self._taken[index] = _Taken.ADDED if partial.present[index] else _Taken.COPIED
        partial.add(index, gradient.detach() if gradient.requires_grad else gradient)

    def _take_leftovers(self, partial: Partial) -> None:
        """Add what is in `p.grad` although no hook has taken it."""
        with torch.no_grad():
            for index, parameter in enumerate(self._parameters):
                if parameter.grad is not None:
                    self._take(index, partial)

    def _weighted(self, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply before anything is added, so that the product is rounded alike wherever the slot is."""
        if self._weight is None:
            return gradient
        # The mean over nothing is NaN, and weighs nothing.
        return gradient * self._weight if self._weight else torch.zeros_like(gradient)

    def _count_down(self, bucket: int) -> None:
        self._missing[bucket] -= 1
        # In the order of the buckets on every rank, as an exchange made of collectives needs it.
        while self._started < len(self._lanes) and not self._missing[self._started]:
            if not self._buckets[self._started].parameters:
                return  # the extras are known only after the slot
            try:
                self._start_next()
            except CollectiveAborted as error:
                # The slot is still worth finishing: the next world can go on from it.
                self._is_armed = False
                self._aborted = error
                return

    def _is_gone(self, index: int) -> bool:
        """Whether the bucket of a parameter is already on its way."""
        return self._bucket_of[index] < self._started

    # The exchange -------------------------------------------------------------------------------------------

    def _open_exchange(self) -> None:
        if self._started:
            return
        group = self._group
        assert group is not None
        if self._code is not None:
            self._exchange = CodedExchange(group if group.size > 1 else None, self._fold, self._code, self._neighbours)
        elif self._size() == 1:
            self._exchange = Alone()
        else:
            self._exchange = OrderedExchange(group, self._fold, self._neighbours)
        self._lanes = [
            Lane(
                index=index,
                size=bucket.size,
                output=self._output.buckets[index],
                partials={
                    term: partial.memory.buckets[index][: bucket.size] for term, partial in self._sums.totals().items()
                },
                scaled=bool(bucket.parameters),
                token=self._output.tokens[index],
                tokens={term: partial.memory.tokens[index] for term, partial in self._sums.totals().items()},
            )
            for index, bucket in enumerate(self._buckets)
        ]

    def _start_next(self) -> None:
        assert self._exchange is not None
        index, self._started = self._started, self._started + 1
        for partial in self._sums.totals().values():
            partial.complete(self._buckets[index])
        self._exchange.start(self._lanes[index])

    def _complete_exchange(self, divisor: float | Callable[[torch.Tensor], float]) -> Reduced:
        if self._aborted is not None:
            raise self._aborted
        self._open_exchange()
        exchange = self._exchange
        assert exchange is not None
        while self._started < len(self._lanes):
            self._start_next()
        *gradients, tail = self._lanes
        if callable(divisor):
            exchange.fold(tail, 1.0)
            exchange.publish(tail)
            exchange.finish(tail)
            number = divisor(self._output.extras.clone())
        else:
            number = divisor
        finite = True
        for lane in gradients:
            finite &= exchange.fold(lane, number)
            exchange.publish(lane)
        if not callable(divisor):
            exchange.fold(tail, 1.0)
            exchange.publish(tail)
            exchange.finish(tail)
        for lane in gradients:
            exchange.finish(lane)
        return Reduced(finite, not self._spoiled, self._output.extras.clone())

    def _close_exchange(self) -> None:
        """End an exchange that was not completed: afterwards nobody writes into our memory any more."""
        if self._started and self._group is not None:
            self._group.abort("a reduction was given up")
            self._group.drain()
        self._forget_exchange()

    def _forget_exchange(self) -> None:
        if self._spoiled:
            self._sums.clear()
        self._exchange = None
        self._lanes = []
        self._started = 0
        self._is_armed = self._spoiled = self._tainted = False
        self._aborted = None

    # Slots --------------------------------------------------------------------------------------------------

    def _leave_slot(self) -> None:
        self._into = self._slot = self._weight = self._failure = None
        self._is_armed = self._is_adding = False
        self._forget_grads()

    def _forget_grads(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _size(self) -> int:
        if self._group is None:
            raise RuntimeError("There is no plan yet.")
        return self._group.size

    def _refuse_inside_a_slot(self, what: str) -> None:
        if self._into is not None:
            raise RuntimeError(f"{what} inside slot {self._slot}: end or discard it first.")

