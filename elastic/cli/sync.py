"""`elastic sync advise`: what a link costs each way of agreeing, before anything is trained."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from elastic.cli import options
from elastic.sync.advice import BYTES, MEAN_EVERY, Site, advise

_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_COUNTS = {"K": 1e3, "M": 1e6, "B": 1e9, "": 1.0}


class Quantity(click.ParamType[float]):
    """A number with a unit."""

    def __init__(self, name: str, units: dict[str, float], example: str) -> None:
        self.name, self._units, self._example = name, units, example

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(value))
        if found is None or found[2] not in self._units or not float(found[1]):
            units = ", ".join(unit for unit in self._units if unit)
            self.fail(f"{value!r} is no number above 0 with a unit ({units}), such as {self._example}", param, ctx)
        return float(found[1]) * self._units[found[2]]


@click.group()
def sync() -> None:
    """How replicas agree over slow links."""


@sync.command(name="advise")
@click.option("--bandwidth", type=Quantity("RATE", _BITS, "50mbit"), required=True, help="Of each node's link, each way.")
@click.option("--latency", type=Quantity("TIME", _SECONDS, "40ms"), required=True, help="From one node to another.")
@click.option("--params", type=Quantity("COUNT", _COUNTS, "1.3B"), required=True, help="Parameters of the model.")
@click.option("--nodes", type=click.IntRange(1), required=True, help="That agree.")
@click.option("--step", type=Quantity("TIME", _SECONDS, "1s"), default="1s", show_default=True,
              help="What a step takes a node without any exchange.")  # fmt: skip
@click.option("--every", type=click.IntRange(1), default=100, show_default=True, help="Local steps of a round.")
@options.as_json
def advise_(bandwidth: float, latency: float, params: float, nodes: int, step: float, every: int, as_json: bool) -> None:
    """Predict the steps of each way of agreeing over a link, and how often nodes compute."""
    site = Site(params, nodes, bandwidth / 8, latency, step)
    found = advise(site, every)
    if as_json:
        click.echo(json.dumps({"site": asdict(site), "strategies": [asdict(each) for each in found]}))
        return
    table = Table("sync=", "exchange every", "an exchange takes", "a step takes", "nodes compute", "sent per step")
    for each in found:
        times = (f"{each.exchange_s:.2f} s", f"{each.step_s:.3f} s", f"{each.utilisation:.1%}")
        table.add_row(each.name, f"{each.every}", *times, f"{each.bytes_per_step / 2**20:,.2f} MiB")
    console = Console()
    console.print(table)
    console.print(
        f"Assumed: {params:,.0f} numbers of {BYTES['']:g} bytes are exchanged as a reduce-scatter and an all-gather, so that "
        f"each node sends and receives {(2 * (nodes - 1)) / nodes:.2f} times that many; every node has {bandwidth / 1e6:g} "
        f"Mbit/s each way to itself, a message takes {1000 * latency:g} ms, and nothing is sent while a node computes. In a pair "
        f"(NoLoCo) each sends its slow parameters meanwhile, and as much again at the end of a round; the mean of all is made "
        f"after every {MEAN_EVERY} rounds.",
        soft_wrap=True,
    )
