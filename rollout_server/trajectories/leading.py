"""How much two conversations have in common."""

import operator
from collections.abc import Sequence
from typing import Any


def identical(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first messages are the same objects."""
    return [*map(operator.is_, one, other), False].index(False)


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first messages are equal."""
    at = identical(one, other)
    while at < min(len(one), len(other)) and one[at] == other[at]:
        at += 1
    return at
