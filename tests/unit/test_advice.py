"""What a link is predicted to cost, and the command that says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from elastic.cli import elastic
from elastic.sync.advice import MEAN_EVERY, Site, advise, every_for, exchange_bytes, exchange_s, pair_bytes, pair_s

SLOW = Site(parameters=1e6, nodes=4, bytes_per_s=2.5e6, latency_s=0.04, step_s=0.1)


def test_an_exchange_sends_what_the_formula_says() -> None:
    assert exchange_bytes(SLOW) == 2 * 1e6 * 4 * 3 / 4
    assert exchange_s(SLOW) == pytest.approx(6e6 / 2.5e6 + 0.08)
    assert exchange_s(Site(1e6, 1, 2.5e6, 0.04, 0.1)) == 0.0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.999])
def test_the_fewest_steps_for_a_share_are_found(share: float) -> None:
    every = every_for(SLOW, share)

    def computes(steps: int) -> float:
        return steps * SLOW.step_s / (steps * SLOW.step_s + exchange_s(SLOW))

    assert computes(every) >= share and (every == 1 or computes(every - 1) < share)


def test_what_is_sent_more_rarely_costs_less() -> None:
    every_step, chosen, int8, fp4, ninety, more, streaming, pairs = advise(SLOW, 100)
    assert every_step.step_s == pytest.approx(0.1 + exchange_s(SLOW)) and chosen.every == 100
    assert chosen.bytes_per_step == every_step.bytes_per_step / 100
    assert every_step.bytes_per_step / 3.9 > 100 * int8.bytes_per_step > 1.9 * 100 * fp4.bytes_per_step
    assert ninety.utilisation >= 0.9 and more.utilisation >= 0.95 and more.every > ninety.every
    assert streaming.every == 25 and streaming.bytes_per_step == pytest.approx(chosen.bytes_per_step)
    assert streaming.exchange_s < 0.3 * chosen.exchange_s
    assert pairs.bytes_per_step == pytest.approx((2 * 4e6 + exchange_bytes(SLOW) / MEAN_EVERY) / 100)


def test_a_pair_sends_as_much_with_a_thousand_nodes_and_waits_for_half_of_it_unless_the_round_is_short() -> None:
    many = replace(SLOW, nodes=1000)
    assert pair_bytes(many) == pair_bytes(SLOW) == 8e6 and pair_bytes(replace(SLOW, nodes=1)) == 0.0
    one_s = 4e6 / 2.5e6 + 0.04
    assert pair_s(SLOW, 100) == pytest.approx(one_s + exchange_s(SLOW) / MEAN_EVERY)
    assert pair_s(SLOW, 1) == pytest.approx(2 * one_s - 0.1 + exchange_s(SLOW) / MEAN_EVERY)


def test_the_command_prints_its_assumptions_and_json() -> None:
    asked = ["sync", "advise", "--bandwidth", "50mbit", "--latency", "40ms", "--params", "1.3B", "--nodes", "16"]
    shown = CliRunner().invoke(elastic, asked)
    assert shown.exit_code == 0 and "Assumed: 1,300,000,000 numbers of 4 bytes" in shown.output
    answer = json.loads(CliRunner().invoke(elastic, [*asked, "--json"]).output)
    assert answer["site"]["bytes_per_s"] == 50e6 / 8
    assert [each["every"] for each in answer["strategies"]][:2] == [1, 100]


@pytest.mark.parametrize(("option", "value"), [("--bandwidth", "50 mbps"), ("--latency", "fast"), ("--params", "0B")])
def test_what_does_not_parse_is_named(option: str, value: str) -> None:
    asked = {"--bandwidth": "50mbit", "--latency": "40ms", "--params": "1M", "--nodes": "4"} | {option: value}
    shown = CliRunner().invoke(elastic, ["sync", "advise", *(word for pair in asked.items() for word in pair)])
    assert shown.exit_code == 2 and f"{value!r} is no number above 0 with a unit" in shown.output
