"""Module buffers (batch-norm statistics and the like), made independent of who computes which slot.

Every slot starts from the committed copy. What a commit makes of the slots' values is the buffer's rule: by default
floating buffers become the mean over the slots, in slot order, and integer ones become slot 0's. Values travel as float64
in the reducer's extras, in which every such value is exact. Large buffers are taken for constants (masks, tables) unless a
rule was given; one that changes all the same is an error, never a silent drift.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic.errors import ConfigError

SMALL_NUMEL = 4096  # beyond this, only the statistics of norm layers are expected to change
STACKED_NUMEL_MAX = 4 * 2**20  # elements of all slots together that a callable rule may ask for

Merge = Callable[[Tensor, Tensor], Tensor]
"""(committed copy, values of all slots, [slots, *shape]) -> new committed copy."""
Rule = str | Merge

RULES = ("mean", "first", "delta", "constant")
"""The mean over the slots; slot 0's value; the sum of all slots' changes; never exchanged."""


@dataclass(frozen=True, eq=False)
class _Kept:
    """A buffer that training changes, its committed copy, and where in a slot's vector its values are."""

    name: str
    buffer: Tensor
    copy: Tensor
    rule: Rule
    offset: int
    numel: int


class CommittedBuffers:
    """The committed copy of every buffer that training changes.

    Args:
        models: By name.
        slots: Slots of a step.
        rules: "<model>.<buffer name>", or a pattern of it as in a shell -> what a commit makes of the slots' values.

    Attributes:
        copies: "<model>.<buffer name>" -> the committed copy; what snapshots, joiners and digests read.
        extras: Length of the float64 vector that carries one slot's buffers.

    Raises:
        ConfigError: a rule names no buffer or is none, or a buffer is too large for its rule.
    """

    def __init__(self, models: Mapping[str, nn.Module], slots: int = 1, rules: Mapping[str, Rule] | None = None) -> None:
        self._slots = slots
        self._kept: list[_Kept] = []
        self._constants: list[tuple[str, Tensor, int]] = []
        unused = dict(rules or {})
        seen: set[int] = set()
        self.extras = 0
        for model_name, model in models.items():
            for module_name, module in model.named_modules():
                for buffer_name, buffer in module.named_buffers(recurse=False):
                    if id(buffer) in seen:
                        continue
                    seen.add(id(buffer))
                    name = ".".join(part for part in (model_name, module_name, buffer_name) if part)
                    rule = self._rule_of(name, buffer, _is_statistic(module), rules or {}, unused)
                    self._keep(name, buffer, rule)
        if unused:
            known = ", ".join(sorted([kept.name for kept in self._kept] + [name for name, _, _ in self._constants]))
            raise ConfigError(f"session.buffer_rule({min(unused)!r}) names no buffer: there are {known or 'none'}")
        self.copies: dict[str, Tensor] = {kept.name: kept.copy for kept in self._kept}

    @staticmethod
    def _rule_of(
        name: str, buffer: Tensor, statistic: bool, rules: Mapping[str, Rule], unused: dict[str, Rule]
    ) -> Rule:
        for pattern, rule in rules.items():
            if fnmatch.fnmatchcase(name, pattern):
                unused.pop(pattern, None)
                return rule
        if not statistic and buffer.numel() > SMALL_NUMEL:
            return "constant"
        return "mean" if buffer.is_floating_point() else "first"

    def _keep(self, name: str, buffer: Tensor, rule: Rule) -> None:
        if isinstance(rule, str) and rule not in RULES:
            raise ConfigError(f"the rule {rule!r} of buffer {name!r} is unknown: choose one of {RULES}, or a function")
        if rule == "constant":
            self._constants.append((name, buffer, buffer._version))
            return
        numel = buffer.numel() * (1 if isinstance(rule, str) else self._slots)
        if not isinstance(rule, str) and numel > STACKED_NUMEL_MAX:
            raise ConfigError(
                f"buffer {name!r} has {buffer.numel()} elements, too many for a function of all {self._slots} slots' values "
                f"(at most {STACKED_NUMEL_MAX} together): use one of {RULES}"
            )
        self._kept.append(_Kept(name, buffer, buffer.detach().clone(), rule, self.extras, numel))
        self.extras += numel

    def begin_slot(self) -> None:
        """Give the modules the committed copy."""
        self.restore()

    def of_slot(self, slot: int) -> Tensor:
        """Return the float64 vector of what a slot's forward left in the modules, for the fold.

        Raises:
            ConfigError: a buffer changed that is not exchanged.
        """
        for name, buffer, version in self._constants:
            if buffer._version != version:
                raise ConfigError(
                    f"buffer {name!r} ({buffer.numel()} elements) changes during the forward pass, and only norm "
                    f"statistics and buffers of at most {SMALL_NUMEL} elements are kept equal on all workers by "
                    f"themselves: say how with session.buffer_rule({name!r}, ...) before prepare()"
                )
        # Adding -0.0 changes no bit, so that what only one slot gives comes out of the sum as it went in.
        vector = torch.full((self.extras,), -0.0, dtype=torch.float64)
        for kept in self._kept:
            value = kept.buffer.detach().reshape(-1).to("cpu", torch.float64)
            if kept.rule == "delta":
                value = value - kept.copy.reshape(-1).to("cpu", torch.float64)
            if isinstance(kept.rule, str):
                if kept.rule != "first" or slot == 0:
                    vector[kept.offset : kept.offset + kept.numel] = value
            else:
                begin = kept.offset + slot * value.numel()
                vector[begin : begin + value.numel()] = value
        return vector

    def places_of(self, prefixes: Sequence[str]) -> list[slice]:
        """Return where in a slot's vector the values of buffers are whose name begins with one of these."""
        kept = (each for each in self._kept if each.name.startswith(tuple(prefixes)))
        return [slice(each.offset, each.offset + each.numel) for each in kept]

    def commit(self, folded: Tensor, slots: Sequence[int]) -> None:
        """Take over the fold of the vectors of these slots, which had samples."""
        for kept in self._kept:
            values = folded[kept.offset : kept.offset + kept.numel]
            if kept.rule == "mean":
                kept.copy.copy_((values / len(slots)).view(kept.copy.shape))
            elif kept.rule == "delta":
                kept.copy.add_(values.view(kept.copy.shape).to(kept.copy.device, kept.copy.dtype))
            elif kept.rule == "first":
                if 0 not in slots:
                    continue  # it was nobody's, so that the committed copy stays
                kept.copy.copy_(values.view(kept.copy.shape))
            else:
                assert not isinstance(kept.rule, str)
                stacked = values.view(self._slots, *kept.copy.shape)[list(slots)].to(kept.copy.device, kept.copy.dtype)
                kept.copy.copy_(kept.rule(kept.copy, stacked))
        self.restore()

    def adopt(self) -> None:
        """Make what the modules have the committed copy."""
        for kept in self._kept:
            kept.copy.copy_(kept.buffer)

    def received(self) -> None:
        """Take over what a joiner was given: the committed copies, and the constants in the modules themselves."""
        self._constants = [(name, buffer, buffer._version) for name, buffer, _ in self._constants]
        self.restore()

    def held(self) -> list[Tensor]:
        """Return what the modules have, which a slot in progress may have changed."""
        return [kept.buffer.detach().clone() for kept in self._kept]

    def put(self, values: Sequence[Tensor]) -> None:
        """The inverse of `held`: a commit came in the middle of a slot, which goes on."""
        for kept, value in zip(self._kept, values, strict=True):
            kept.buffer.data.copy_(value)

    def restore(self) -> None:
        """Make the modules' buffers the committed copy (after a commit, a skipped step or a throwaway slot)."""
        # Always: a buffer's version does not tell whether it changed, since batch norm's kernels do not count it up.
        for kept in self._kept:
            kept.buffer.data.copy_(kept.copy)


def _is_statistic(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase)
