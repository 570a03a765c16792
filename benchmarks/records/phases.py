"""Measure how long each phase of a cell takes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .files import Record

T = TypeVar("T")
NAMES = {
    "load": "loading checkpoints",
    "cache": "caching images",
    "turn": "waiting for the device",
    "wait": "waiting for images",
    "model": "forward passes and attention",
    "plain": "plain passes for comparison",
    "crops": "five crops",
    "agreement": "lam without labels",
    "metrics": "metrics",
    "statistics": "intervals and tests",
    "disk": "keeping scores",
}


class Phases:
    """Measures seconds by phase; the phases are those of `NAMES`.

    Attributes:
        seconds: seconds of each phase so far.

    Example:
        >>> phases = Phases()
        >>> with phases("load"):
        ...     pass
        >>> list(phases.seconds)
        ['load']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to a phase, without the time of phases nested in it."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            within = sum(self.seconds.values()) - before
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started - within

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, adding the time until each arrives to the phase `wait`."""
        iterator = iter(items)
        while True:
            with self("wait"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def where_the_time_went(records: Iterable[Record]) -> str | None:
    """Return one line with the share of each phase over all records that have phases, or None."""
    phases = [record.get("phases", {}) for record in records]
    total = {name: sum(seconds.get(name, 0.0) for seconds in phases) for name in NAMES}
    every = sum(total.values())
    parts = [f"{NAMES[name]} {seconds / every:.0%}" for name, seconds in total.items() if seconds]
    return f"{every:,.1f} s of computing: {', '.join(parts)}" if parts else None
