"""The digest of a model whose layers lie on several workers. Pure, so that a controller can put it together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence


def digest_of_layers(digests: Sequence[str]) -> str:
    """Hex digest of a whole model from those of its layers, in order."""
    return hashlib.sha256("".join(digests).encode("ascii")).hexdigest()[:32]


def joined_digests(digests: Mapping[int, str]) -> str:
    """What a worker says of the layers that it holds: `number:digest` of each."""
    return " ".join(f"{number}:{digest}" for number, digest in sorted(digests.items()))


def digest_of_parts(parts: Iterable[str], layers: int) -> str | set[str]:
    """Return the digest of a model of so many layers from what workers say of theirs.

    Where two say different things of a layer, those are returned instead; where nobody says anything of one, "".
    """
    found: dict[int, str] = {}
    for part in parts:
        for each in part.split():
            number, _, digest = each.partition(":")
            if found.setdefault(int(number), digest) != digest:
                return {f"layer {number}: {found[int(number)]}", f"layer {number}: {digest}"}
    return digest_of_layers([found[number] for number in range(layers)]) if len(found) == layers else ""
