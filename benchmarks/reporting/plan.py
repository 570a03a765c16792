"""Print what a sweep would do, for `--dry-run`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .tables import MANY, print_failure, print_prose

SIZES, REASONS = 10, 10  # number of image sizes and reasons that are printed, the most frequent ones
TO_DO = "to do"


@dataclass(frozen=True)
class Planned:
    """A cell and its state; `reason` says why there is nothing to do."""

    model: str
    data: str
    task: str
    size: str
    images: int
    state: str
    reason: str | None


def is_long(cells: Sequence[object]) -> bool:
    """Whether there are too many cells to list each."""
    return len(cells) > MANY


def print_plan(cells: Sequence[Planned], every: bool, console: Console) -> None:
    """Print each cell, or for many cells, unless `every` is true, their number in each state; then the reasons."""
    if every or not is_long(cells):
        _print_cells(cells, console)
    else:
        _print_counts(cells, console)
    reasons = Counter((cell.state, cell.reason) for cell in cells if cell.reason)
    for (state, reason), count in reasons.most_common(REASONS):
        print_failure(f"{count} cells {state}", reason or "", console)
    if more := [count for _, count in reasons.most_common()[REASONS:]]:
        print_prose(f"{sum(more)} more cells, for {len(more)} other reasons.", console)


def _print_cells(cells: Sequence[Planned], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "data", "task", "px", "images", "state"):
        table.add_column(name, justify="right" if name in ("px", "images") else "left", overflow="fold")
    for cell in cells:
        table.add_row(cell.model, cell.data, cell.task, cell.size, str(cell.images), cell.state)
    console.print(table)


def _print_counts(cells: Sequence[Planned], console: Console) -> None:
    """Print the number of cells in all, for each data set and task, and for each image size."""
    states = Counter(cell.state for cell in cells)
    order = [state for state, _ in sorted(states.items(), key=lambda found: (found[0] != TO_DO, -found[1]))]
    said = ", ".join(f"{states[state]} {state}" for state in order)
    print_prose(f"{len(cells)} cells: {said}; --dry-run cells lists each.", console)
    counts = Counter((cell.data, cell.task, cell.state) for cell in cells)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("data", "task", *order):
        table.add_column(name, justify="right" if name in order else "left", overflow="fold")
    for data, task in dict.fromkeys((cell.data, cell.task) for cell in cells):
        table.add_row(data, task, *(str(counts[data, task, state]) for state in order))
    console.print(table)
    sizes = Counter(cell.size for cell in cells if cell.state == TO_DO)
    if named := ", ".join(f"{size} px {count}" for size, count in sizes.most_common(SIZES)):
        rest = f", {len(sizes) - SIZES} other sizes {sizes.total() - sum(c for _, c in sizes.most_common(SIZES))}"
        print_prose(f"Cells to do by size: {named}{rest if len(sizes) > SIZES else ''}.", console)
