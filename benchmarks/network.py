"""A cluster whose nodes are hosts of a network lab, so that their cables can be cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.netlab import Lab, obstacle
from examples.cluster import Cluster

__all__ = ["Lab", "LabCluster", "obstacle"]


class LabCluster(Cluster):
    """One job on hosts of a lab: "controller", and one for each node.

    Args:
        lab: Has a host for each name that daemons are started under.
        folder, script, nodes: As for `Cluster`.
    """

    def __init__(self, lab: Lab, folder: Path, script: Sequence[str], nodes: int) -> None:
        super().__init__(folder, script, nodes_max=nodes)
        self.lab = lab
        self._host = lab.address("controller")

    def start_agent(self, node: str, workers: int = 1) -> None:
        self._agent_options = ("--local-addr", self.lab.address(node))
        super().start_agent(node, workers)

    def _inside(self, name: str) -> Sequence[str]:
        return self.lab.inside(name)

    def _door(self) -> str:
        return f"127.0.0.1:{self.lab.door('controller', self._port)}"
