"""Where a tensor stands in a model, by its name: layer, kind, module and order."""

import re

NO_LAYER = "(no layer)"
MOST_DIGITS = 18  # of a number in a name; what is longer is text, which Python may not count
LAYER = re.compile(rf"(?:.*?\.)??\d{{1,{MOST_DIGITS}}}(?=\.|$)")
NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


def layer_of(name: str) -> str:
    """Return the prefix of a tensor name up to its first number: its layer, or "" for none."""
    found = LAYER.match(name)
    return found.group() if found else ""


def kind_of(name: str) -> str:
    """Return the module kind: the name without its layer, other numbers as *."""
    layer = layer_of(name)
    rest = name[len(layer) :].lstrip(".") if layer else name
    return NUMBER.sub("*", rest)


def module_of(name: str) -> str:
    """Return the part of a layer that a tensor is in, or the name of one outside of all layers."""
    parts = kind_of(name).split(".")
    return parts[0] if layer_of(name) else ".".join(parts[:-1]) or parts[0]


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 10 behind layer 9."""
    return [
        (int(part), "") if part.isdecimal() and len(part) <= MOST_DIGITS else (-1, part)
        for part in re.split(r"(\d+)", name)
    ]
