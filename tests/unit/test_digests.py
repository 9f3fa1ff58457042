"""The digest of a model whose layers lie on several workers."""

from __future__ import annotations

from elastic.digests import digest_of_layers, digest_of_parts, joined_digests

WHOLE = {0: "aa", 1: "bb", 2: "cc"}


def part(*numbers: int) -> str:
    return joined_digests({number: WHOLE[number] for number in numbers})


def test_parts_make_up_the_whole_however_they_are_cut() -> None:
    expected = digest_of_layers(list(WHOLE.values()))
    for parts in ((part(0, 1, 2),), (part(0), part(1, 2)), (part(2, 1), part(0), part(1, 2))):
        assert digest_of_parts(parts, 3) == expected


def test_a_layer_that_nobody_has_leaves_the_digest_unknown() -> None:
    assert digest_of_parts([part(0), part(2)], 3) == ""
    assert digest_of_parts([], 3) == ""


def test_a_difference_is_named() -> None:
    assert digest_of_parts([part(0, 1, 2), "1:ff"], 3) == {"layer 1: bb", "layer 1: ff"}
