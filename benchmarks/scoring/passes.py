"""Run a checkpoint over the images of a cell once, and share the scores with other tasks on the same images."""

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
Turn = Callable[[], AbstractContextManager[Any]]  # returns a context within which no other process uses the device


@dataclass(frozen=True)
class Pass:
    """The scores of one pass.

    Attributes:
        columns: the columns of the head that the scores are of.
        scores: scores of the images that could be read.
        read: their indices, sorted; for a stream, hashes of the images.
        bad: indices of the images that could not be read.
        targets: the targets of a stream; otherwise None, since the data has them.
        cost: times of this pass and of plain passes, with `--time-plain`; otherwise None.
        device_seconds: time for which the device was busy.
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
        """Return the scores of these columns, which must be among those of the pass."""
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
    """Run every image of a cell, unless the last pass of the same model has the scores of the same images.

    Returns:
        The pass, and whether it is one that was run for another task.
    """
    terms = sorted({term for setting in cell.scored_settings(options) for term in setting.terms})
    pixels = json.dumps([cell.data.fingerprint, cell.data.where, cell.grid, preprocessing, terms])
    last = loaded.passes.get(pixels) if cell.data.stream is None else None
    if last is not None and last.serves(alignment.columns):
        return last, True
    loaded.passes.clear()  # frees the last pass before the next one begins
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
            plain_seconds(model, loader, options)  # warm-up; starts the loader's workers
            plain.append(plain_seconds(model, loader, options))
    passed, clock = False, DeviceClock(options.device)
    # A loader that has started reads the first images during another process's turn.
    begun = loader if options.time_plain else StartedLoader(loader)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal passed
        yield from clock.over(readable(phases.waiting(track(begun)), loader, bad, read))
        passed = True

    with _turn_on_device(turn, options, phases), phases("model"):
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
            if not passed and _out_of_memory(error):  # after the last batch a smaller batch would not help
                raise BatchTooLargeError(str(error)) from error
            raise
    if cell.data.stream:  # the order of its images depends on the number of workers
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


class StartedLoader:
    """A loader whose workers have started to read."""

    def __init__(self, loader: Any) -> None:
        self._batches, self._count = iter(loader), len(loader)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return self._batches


@contextmanager
def _turn_on_device(turn: Turn, options: Options, phases: Phases) -> Iterator[None]:
    """Wait for this process's turn on the device; afterwards free the memory that torch's allocator caches."""
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
    """A forward pass ran out of memory; a smaller batch may fit."""


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
