"""CURVE keys of a keeper: with them slices and parity are encrypted between nodes, and only who is known may ask."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Keys:
    """A key pair as Z85 text; the public half is told to the others by the control plane."""

    public: str
    secret: str = field(repr=False)


def make_keys() -> Keys:
    """Return a new pair."""
    import zmq  # an agent without a join token has no use for it

    public, secret = zmq.curve_keypair()
    return Keys(public.decode(), secret.decode())
