"""What a code leaves out comes with the next: nothing is lost over many steps, and what is computed again begins alike."""

from __future__ import annotations

import pytest
import torch

from elastic.errors import ConfigError
from elastic.feedback import ErrorFeedback
from elastic.quantize import Code, decode, encode
from elastic.sync import DiLoCo
from tests.unit.test_local import Run


def sent(code: Code, values: torch.Tensor) -> torch.Tensor:
    return decode(code, encode(code, values), values.numel())


@pytest.mark.parametrize("code", list(Code))
def test_the_sum_of_what_is_sent_is_the_sum_of_what_was_meant(code: Code) -> None:
    generator = torch.Generator().manual_seed(0)
    feedback = ErrorFeedback(code)
    meant, given, bare = torch.zeros(300), torch.zeros(300), torch.zeros(300)
    for _ in range(50):
        values = torch.randn(300, generator=generator) + 0.3
        bucket = values.clone()
        feedback.add(4, [bucket])
        feedback.commit()
        meant, given, bare = meant + values, given + sent(code, bucket), bare + sent(code, values)
    largest_error = (meant - given).abs().max()
    assert largest_error < (0.05 if code is Code.INT8 else 1.0), "what is left out is that of one step"
    assert (meant - bare).norm() > 3 * (meant - given).norm()


def test_what_is_computed_again_begins_with_the_errors_of_the_committed_step() -> None:
    feedback, values = ErrorFeedback(Code.FP4), torch.linspace(-1, 1, 256)
    feedback.add(0, [values.clone()])
    feedback.commit()
    first, again, paused = values.clone(), values.clone(), values.clone()
    feedback.add(0, [first])
    feedback.add(0, [again])
    assert torch.equal(first, again) and not torch.equal(first, values)
    feedback.pauses = True
    feedback.add(0, [paused])
    assert torch.equal(paused, values)
    feedback.pauses = False
    feedback.keep({1})
    feedback.add(0, [paused])
    assert torch.equal(paused, values), "the slot went to another worker"


def test_replicas_come_nearer_to_what_they_are_without_a_code() -> None:
    def final(**options: object) -> torch.Tensor:
        run = Run(24, DiLoCo(4, 0.7, 0.0, nesterov=False, **options))  # type: ignore[arg-type]
        run.train(30)
        return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])

    exact = final()
    with_feedback, without = ((final(quantize="fp4", feedback=feeds) - exact).norm() for feeds in (True, False))
    assert with_feedback < without


def test_feedback_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left out of what is sent as it is"):
        DiLoCo(feedback=True)
