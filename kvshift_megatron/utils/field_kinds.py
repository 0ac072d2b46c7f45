"""Kinds of values that a field of a file or a flag may hold, with the words for them."""

import math
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a field may hold.

    Args:
        expected: In words, for messages.
        accepts: Whether a value is of this kind.
        optional: Whether null (None) is the same as leaving the field out.
    """

    expected: str
    accepts: Callable[[Any], bool]
    optional: bool = True


def whole(low: int, high: int) -> Kind:
    """Return the kind of whole numbers in a range."""
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: _is_int(value) and low <= value <= high,
    )


def number(low: float, high: float) -> Kind:
    """Return the kind of finite numbers in a range."""
    # NaN fails every comparison. Python compares whole numbers of any size exactly.
    return Kind(
        f"a number from {low:g} to {high:g}",
        lambda value: _is_number(value) and low <= value <= high,
    )


def at_least(low: float) -> Kind:
    """Return the kind of finite numbers that are not below a limit."""
    return Kind(
        f"a finite number, at least {low:g}",
        lambda value: _is_number(value) and low <= value < math.inf,
    )


def above(low: float) -> Kind:
    """Return the kind of finite numbers above a limit."""
    return Kind(
        f"a finite number above {low:g}",
        lambda value: _is_number(value) and low < value < math.inf,
    )


def share(below_one: bool = False) -> Kind:
    """Return the kind of numbers from 0 to 1, with or without 1 itself."""
    return Kind(
        "a number from 0 to below 1" if below_one else "a number from 0 to 1",
        lambda value: _is_number(value) and 0 <= value <= 1 and not (below_one and value == 1),
    )


def words(*choices: str) -> Kind:
    """Return the kind of short words, or of certain words only."""
    if not choices:
        return Kind("a word", lambda value: isinstance(value, str) and len(value) < 100)
    expected = f"one of {', '.join(choices)}"
    return Kind(expected, lambda value: isinstance(value, str) and value in choices)


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists of a kind."""
    return Kind(
        f"a list, each {kind.expected}",
        lambda value: isinstance(value, list) and all(map(kind.accepts, value)),
    )


def either(one: Kind, other: Kind) -> Kind:
    """Return the kind of what is of one of two kinds."""
    return Kind(
        f"{one.expected}, or {other.expected}",
        lambda value: one.accepts(value) or other.accepts(value),
    )


def needed(kind: Kind) -> Kind:
    """Return the kind of a field that the library does not read as left out if it is null."""
    return kind._replace(optional=False)


def or_null(kind: Kind) -> Kind:
    """Return the kind of a field in an object that may be null."""
    return kind._replace(accepts=lambda value: value is None or kind.accepts(value))


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return _is_int(value) or type(value) is float


def _is_plain(value: Any, levels: int = 2) -> bool:
    if isinstance(value, list | tuple) and levels:
        return all(_is_plain(item, levels - 1) for item in value)
    if isinstance(value, str):
        return len(value) < 100
    return value is None or type(value) in (bool, int, float)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
PLAIN = Kind("a number, a word, true, false, or a list of these", _is_plain)
# Sizes of a model; torch can hold every product of them.
LAYERS, HIDDEN, HEADS, FFN = (whole(1, high) for high in (10_000, 2**20, 2**16, 2**24))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def short(value: Any) -> str:
    """Return a value for a message, in one short line."""
    try:
        return f"{reprlib.repr(value):.100}".replace("\n", " ")
    except Exception:  # a number of too many digits, or an object without a representation
        return f"<{type(value).__name__}>"
