"""Pure measures of a job's health: what was productive, what was lost, how fast steps go.

Numbers in, numbers out: nothing here reads a clock, asks a process or sends anything, but for the exporter, which answers
Prometheus.
"""
