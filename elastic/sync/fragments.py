"""Which parameters are agreed on together, where it is one part of a model after the other: layers in turns.

A layer is a child of the longest nn.ModuleList or nn.Sequential in the model. What lies outside (embedding, head) goes to the
smallest fragment. A pure function of the model's structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from elastic.errors import ConfigError


def fragments_of(models: Iterable[nn.Module], parameters: Sequence[nn.Parameter], count: int) -> list[list[int]]:
    """Return for each fragment the places of its parameters among all.

    Raises:
        ConfigError: there are fewer layers than fragments.
    """
    place_of = {id(parameter): place for place, parameter in enumerate(parameters)}
    if count == 1:
        return [list(range(len(parameters)))]
    layers: list[list[int]] = []
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.ModuleList | nn.Sequential):
                held = [[place_of[id(p)] for p in child.parameters() if id(p) in place_of] for child in module]
                layers = max(layers, [places for places in held if places], key=len)
    if len(layers) < count:
        raise ConfigError(
            f"fragments={count}, and the model has {len(layers)} layer(s) (trained children of its longest nn.ModuleList or "
            "nn.Sequential): ask for at most as many fragments"
        )
    fragment_of: dict[int, int] = {}
    for number, places in enumerate(layers):
        for place in places:
            fragment_of.setdefault(place, number % count)
    sizes = [sum(parameters[p].numel() for p, f in fragment_of.items() if f == number) for number in range(count)]
    for place, parameter in enumerate(parameters):
        if place not in fragment_of:
            smallest = sizes.index(min(sizes))
            fragment_of[place] = smallest
            sizes[smallest] += parameter.numel()
    return [[place for place in range(len(parameters)) if fragment_of[place] == number] for number in range(count)]
