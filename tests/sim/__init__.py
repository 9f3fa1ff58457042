"""A whole cluster in one thread: the real machines of controller, agents and workers on a fake clock, network and disk.

`scenario` turns a seed into sizes, speeds and faults; `cluster` builds the processes and runs them; `controller`, `agent`
and `worker` are the shells around the machines; `links`, `groups` and `process` are the world that fails under them. The
checkers watch everything and stop the run at the first broken promise. `python -m tests.sim --seed N` replays one.
"""
