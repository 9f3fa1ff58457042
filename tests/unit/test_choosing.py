"""The choice of the erasure code's engine: what writes a wrong byte or cannot be loaded is passed over, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from torch import Tensor

from elastic import isal
from elastic.errors import ConfigError
from recovery.choosing import Trial, choose_engine, describe, self_test, survey
from recovery.codec import Codec
from recovery.engines import Engine, ReedsoloEngine, TorchEngine, XorEngine
from recovery.galois import Matrix
from recovery.isal import IsalEngine


class WrongOnce(ReedsoloEngine):
    """Carries everything; a byte is wrong where the pieces have `bad_length`."""

    name = "a broken library"
    bad_length = 64

    def multiply(self, matrix: Matrix, inputs: Sequence[Tensor], outputs: Sequence[Tensor], accumulate: bool) -> None:
        super().multiply(matrix, inputs, outputs, accumulate)
        if outputs[-1].numel() == self.bad_length and accumulate:
            outputs[-1][-1] ^= 1


class Careless(ReedsoloEngine):
    """The right output, and a changed input."""

    name = "a careless library"

    def multiply(self, matrix: Matrix, inputs: Sequence[Tensor], outputs: Sequence[Tensor], accumulate: bool) -> None:
        super().multiply(matrix, inputs, outputs, accumulate)
        inputs[0].zero_()


def absent() -> Engine:
    return IsalEngine("libno-such-library.so")


def not_isal() -> Engine:
    return IsalEngine("libc.so.6")


def test_an_engine_that_fails_its_self_test_is_passed_over_with_its_reason() -> None:
    trials = survey([absent, not_isal, WrongOnce, Careless, XorEngine, TorchEngine])
    assert isinstance(choose_engine(4, 2, trials), TorchEngine)
    assert isinstance(choose_engine(4, 1, trials), XorEngine)
    sentence = describe(4, 2, trials)
    assert sentence.startswith("The erasure code (4,2) is carried by torch, the fastest engine that passed")
    assert "libno-such-library.so: cannot open" in sentence and "pip install 'pyeclib>=1.6'" in sentence
    assert "undefined symbol: ec_init_tables" in sentence
    assert "a broken library wrote wrong bytes in its self-test (a matrix of 7 rows, 64 bytes)" in sentence
    assert "a careless library wrote wrong bytes" in sentence
    assert "XOR cannot carry it" in sentence and "XOR cannot" not in describe(4, 1, trials)


def test_without_any_engine_the_refusal_gives_all_reasons() -> None:
    trials = [Trial(None, "There is none."), Trial(WrongOnce(), self_test(WrongOnce()))]
    with pytest.raises(ConfigError, match=r"There is none\. a broken library wrote .* Install pyeclib"):
        choose_engine(4, 2, trials)
    with pytest.raises(ConfigError, match=r"engine XOR cannot carry the code \(4,2\)"):
        Codec(4, 2, XorEngine())


def test_isal_is_sought_in_the_wheel_first_and_then_in_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = tmp_path / "pyeclib.libs" / "libisal-1a2b3c.so.2.0.30"
    bundled.parent.mkdir()
    bundled.touch()
    spec = ModuleSpec("pyeclib", None, origin=str(tmp_path / "pyeclib" / "__init__.py"))
    monkeypatch.setattr(isal, "find_spec", lambda name: spec)
    assert isal.libraries() == [str(bundled), "libisal.so.2"]
    monkeypatch.setattr(isal, "find_spec", lambda name: None)
    assert isal.libraries() == ["libisal.so.2"]


def test_isal_is_found_inside_the_wheel_of_pyeclib() -> None:
    # pyeclib is among the development dependencies: if it is not found here, its wheel has changed its layout.
    assert isinstance(choose_engine(), IsalEngine), describe()
    assert describe().startswith("The erasure code (4,2) is carried by ISA-L (libisal")
