"""docs/commands.md names every command and every option, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elastic.cli import elastic

TEXT = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()


def documented() -> dict[str, set[str]]:
    """Return the options in the tables under each heading, for every command that the heading names."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        first_cells = re.findall(r"^\|([^|]*)\|", body, flags=re.MULTILINE)
        options = {option for cell in first_cells for option in re.findall(r"`(--?[a-z][\w-]*)`", cell)}
        for command in re.findall(r"`elastic (\w+)`", heading):
            found.setdefault(command, set()).update(options)
    return found


def test_every_command_is_documented() -> None:
    assert set(documented()) == set(elastic.commands)
    assert set(re.findall(r"^\| `elastic (\w+)", TEXT, flags=re.MULTILINE)) == set(elastic.commands)


@pytest.mark.parametrize("name", sorted(elastic.commands))
def test_the_documented_options_are_those_of_the_command(name: str) -> None:
    params = [param for param in elastic.commands[name].params if param.param_type_name == "option"]
    options = {opt for param in params for opt in (*param.opts, *param.secondary_opts)}
    assert documented()[name] == options


@pytest.mark.parametrize("name", sorted(elastic.commands))
def test_every_option_says_what_it_is_for(name: str) -> None:
    assert elastic.commands[name].help
    for param in elastic.commands[name].params:
        if param.param_type_name == "option":
            assert param.to_info_dict()["help"], f"{param.opts[0]} has no help"
