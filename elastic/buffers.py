"""Module buffers (batch-norm statistics and the like), made independent of who computes which slot.

Every slot starts from the committed copy. At a commit floating buffers become the mean over the slots, in slot order,
and integer ones become slot 0's. They travel as float64 in the reducer's extras, in which every such value is exact.
Large buffers are taken for constants (masks, tables); one that changes all the same is an error, never a silent drift.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from elastic.errors import ConfigError

SMALL_NUMEL = 4096  # beyond this, only the statistics of norm layers are expected to change


class CommittedBuffers:
    """The committed copy of every buffer that training changes.

    Attributes:
        copies: "<model>.<buffer name>" -> the committed copy; what snapshots, joiners and digests read.
        extras: Length of the float64 vector that carries one slot's buffers.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._live: list[Tensor] = []
        self._constants: list[tuple[str, Tensor, int]] = []
        self.copies: dict[str, Tensor] = {}
        seen: set[int] = set()
        for model_name, model in models.items():
            for module_name, module in model.named_modules():
                for buffer_name, buffer in module.named_buffers(recurse=False):
                    if id(buffer) in seen:
                        continue
                    seen.add(id(buffer))
                    name = ".".join(part for part in (model_name, module_name, buffer_name) if part)
                    if _is_statistic(module) or buffer.numel() <= SMALL_NUMEL:
                        self._live.append(buffer)
                        self.copies[name] = buffer.detach().clone()
                    else:
                        self._constants.append((name, buffer, buffer._version))
        self._is_floating = [buffer.is_floating_point() for buffer in self._live]
        self.extras = sum(buffer.numel() for buffer in self._live)

    def begin_slot(self) -> None:
        """Give the modules the committed copy."""
        self.restore()

    def of_slot(self, slot: int) -> Tensor:
        """Return the float64 vector of what a slot's forward left in the modules, for the fold.

        Raises:
            ConfigError: a buffer changed that is too large to be exchanged in every step.
        """
        for name, buffer, version in self._constants:
            if buffer._version != version:
                raise ConfigError(
                    f"buffer {name!r} ({buffer.numel()} elements) changes during the forward pass, and only norm "
                    f"statistics or buffers of at most {SMALL_NUMEL} elements are kept equal on all workers: make it "
                    "smaller, or compute it without a buffer"
                )
        if not self._live:
            return torch.empty(0, dtype=torch.float64)
        parts = []
        for buffer, floating in zip(self._live, self._is_floating, strict=True):
            value = buffer.detach().reshape(-1).to("cpu", torch.float64)
            # Adding -0.0 changes no bit, so that slot 0's integers come out of the sum as they went in.
            parts.append(value if floating or slot == 0 else torch.full_like(value, -0.0))
        return torch.cat(parts)

    def commit(self, folded: Tensor, slots: int) -> None:
        """Take over the fold of all slots' vectors; `slots` of them had samples."""
        offset = 0
        for buffer, copy, floating in zip(self._live, self.copies.values(), self._is_floating, strict=True):
            value = folded[offset : offset + buffer.numel()].view(copy.shape)
            offset += buffer.numel()
            copy.copy_(value / slots if floating else value)
        self.restore()

    def restore(self) -> None:
        """Make the modules' buffers the committed copy (after a commit, a skipped step or a throwaway slot)."""
        # Always: a buffer's version does not tell whether it changed, since batch norm's kernels do not count it up.
        for buffer, copy in zip(self._live, self.copies.values(), strict=True):
            buffer.copy_(copy)


def _is_statistic(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase)
