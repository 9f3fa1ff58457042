"""Pure decisions about who does what after a change: plans, the dealing of slots; and the erasure code of snapshots.

Nothing here waits, sends or remembers: values in, values out, each decision with its reason. Only the erasure code
touches memory, and that is its caller's: `galois` defines it, `codec` carries it out through one of the `engines`.
"""
