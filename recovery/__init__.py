"""Pure decisions about who does what after a change: plans, and the dealing of slots.

Nothing here waits, sends, measures or remembers: values in, values out, each decision with its reason.
"""
