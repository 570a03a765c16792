"""Types for argparse that check numbers on the command line, and `only` for options that must match one thing."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Number = TypeVar("Number", int, float)
Item = TypeVar("Item")


def positive(text: str) -> int:
    return _number(text, int, lambda number: number > 0, "a positive whole number")


def natural(text: str) -> int:
    return _number(text, int, lambda number: number >= 0, "0 or a positive whole number")


def share(text: str) -> float:
    return _number(text, float, lambda number: 0 < number <= 1, "a share above 0, at most 1")


def above_zero(text: str) -> float:
    return _number(text, float, lambda number: 0 < number < math.inf, "a number above 0")


def from_zero(text: str) -> float:
    return _number(text, float, lambda number: 0 <= number < math.inf, "0 or a number above it")


def _number(text: str, kind: type[Number], fits: Callable[[Number], bool], expected: str) -> Number:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not fits(number):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected {expected}.")
    return number


def only(found: Sequence[Item], what: str) -> Item:
    """Return the only item; raises ValueError if there are several, or none. `what` names the items in its text."""
    if len(found) != 1:
        raise ValueError(f"found {len(found)} {what}; expected one.")
    return found[0]
