"""A whole cluster in one thread: the real machines of controller, agents and workers on a fake clock and network.

`scenario` turns a seed into sizes, speeds and `faults`; `controller`, `agent` and `worker` are the shells around the machines;
`process`, `links` and `groups` are what fails under them; `site` holds them all, `strikes` harms them, `checkers` watch, and
`cluster` runs it. `python -m tests.sim --seed N` replays one run.
"""
