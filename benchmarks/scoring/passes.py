"""One pass of a checkpoint over pixels: every image is run once, and serves all tasks that ask about the same ones."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from timm_csra.accelerators import AMP, DeviceClock, on_accelerator
from timm_csra.evaluation.scoring import Scores, allows_test_time_pool, score

from ..data.classes import Alignment
from ..records.files import Record
from ..records.phases import Phases
from .cells import Cell, Options
from .loading import Loaded, readable
from .rivals import five_crops, plain_seconds

Track = Callable[[Iterable[Any]], Iterable[Any]]  # wraps the batches of a cell, to show progress
Turn = Callable[[], AbstractContextManager[Any]]  # within, the device is that of one process


@dataclass(frozen=True)
class Pass:
    """What it gave.

    Attributes:
        columns: of the head, those of the scores.
        scores: of the images that could be read.
        read: their indices, sorted; those of a stream, which have none, are hashes.
        bad: indices of the others.
        targets: of a stream alone; else the data has them.
        cost: seconds beside those of a plain pass, where they were asked for.
        device_seconds: for which the device worked.
    """

    columns: tuple[int, ...]
    scores: Scores
    read: list[int]
    bad: list[int]
    targets: Tensor | None
    cost: Record | None
    device_seconds: float

    def serves(self, columns: Sequence[int]) -> bool:
        return set(columns) <= set(self.columns)

    def of(self, columns: tuple[int, ...]) -> Scores:
        """The scores of these columns, all of which the pass serves."""
        if columns == self.columns:
            return self.scores
        place = {column: index for index, column in enumerate(self.columns)}
        return _selected(self.scores, slice(None), torch.tensor([place[column] for column in columns]))


def the_pass(
    cell: Cell,
    loaded: Loaded,
    loader: Any,
    preprocessing: Record,
    alignment: Alignment,
    options: Options,
    track: Track,
    phases: Phases,
    turn: Turn,
) -> tuple[Pass, bool]:
    """Run every image of a cell, unless the last pass of the same model was over the same pixels.

    Returns:
        The pass, and whether it is one that has served another task.
    """
    terms = sorted({term for setting in cell.scored_settings(options) for term in setting.terms})
    pixels = json.dumps([cell.data.fingerprint, cell.data.where, cell.grid, preprocessing, terms])
    last = loaded.passes.get(pixels) if cell.data.stream is None else None
    if last is not None and last.serves(alignment.columns):
        return last, True
    loaded.passes.clear()  # one at a time is held, and it is gone before others are made
    loaded.passes[pixels] = found = _run(cell, loaded, loader, preprocessing, alignment, options, track, phases, turn)
    return found, False


def _run(
    cell: Cell,
    loaded: Loaded,
    loader: Any,
    preprocessing: Record,
    alignment: Alignment,
    options: Options,
    track: Track,
    phases: Phases,
    turn: Turn,
) -> Pass:
    model = loaded.model
    bad: list[int] = []
    read: list[int] = []
    plain: list[float] = []
    if options.time_plain:
        with phases("plain"), forward_passes(), turn():
            plain_seconds(model, loader, options)  # starts the loader's workers, and warms everything up
            plain.append(plain_seconds(model, loader, options))
    passed, clock = False, DeviceClock(options.device)
    begun = loader if options.time_plain else Begun(loader)  # which reads the first images while another is at work

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal passed
        yield from clock.over(readable(phases.waiting(track(begun)), loader, bad, read))
        passed = True

    with _the_turn(turn, options, phases), phases("model"):
        try:
            scores, targets = score(
                model,
                batches(),
                cell.scored_settings(options),
                columns=alignment.columns,
                device=options.device,
                amp_dtype=AMP[options.amp],
                test_time_pool=allows_test_time_pool(loaded.explanation),
            )
        except Exception as error:
            if not passed and _out_of_memory(error):  # else it is what comes after them that needs the memory
                raise BatchTooLargeError(str(error)) from error
            raise
    if cell.data.stream:  # it comes in another order with every number of workers
        order = torch.tensor(sorted(range(len(read)), key=lambda image: (read[image], int(targets[image]))))
        scores, targets = _selected(scores, order, slice(None)), targets[order]
    cost = None
    if options.time_plain:
        with phases("plain"), forward_passes(), turn():
            plain.append(plain_seconds(model, loader, options))
        seconds = phases.seconds["wait"] + phases.seconds["model"]
        cost = {"plain_seconds": plain, "score_seconds": seconds, "ratio": seconds / (sum(plain) / 2)}
    if cell.five_crops(options):
        with phases("crops"), forward_passes(), turn():
            scores.pooled.update(five_crops(model, loaded.size, loader.dataset, preprocessing, alignment, options))
    of_stream = targets if cell.data.stream else None
    return Pass(alignment.columns, scores, sorted(read), bad, of_stream, cost, clock.seconds())


class Begun:
    """A loader that has begun to read."""

    def __init__(self, loader: Any) -> None:
        self._batches, self._count = iter(loader), len(loader)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return self._batches


@contextmanager
def _the_turn(turn: Turn, options: Options, phases: Phases) -> Iterator[None]:
    """Wait for the turn, and free the memory that the allocator holds when it is over."""
    if turn is nullcontext:
        yield
        return
    with ExitStack() as stack:
        with phases("turn"):
            stack.enter_context(turn())
        try:
            yield
        finally:
            if on_accelerator(options.device):
                torch.accelerator.empty_cache()


def _selected(scores: Scores, images: Tensor | slice, columns: Tensor | slice) -> Scores:
    attention = {term: logits[images][:, columns] for term, logits in scores.attention.items()}
    pooled = {name: logits[images][:, columns] for name, logits in scores.pooled.items()}
    return replace(scores, base=scores.base[images][:, columns], attention=attention, pooled=pooled)


class BatchTooLargeError(Exception):
    """Memory has run out in a forward pass, which needs less with fewer images at a time."""


@contextmanager
def forward_passes() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _out_of_memory(error):
            raise BatchTooLargeError(str(error)) from error
        raise


def _out_of_memory(error: Exception) -> bool:
    told = isinstance(error, RuntimeError) and re.search("not enough memory|can't allocate memory", str(error))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(told)
