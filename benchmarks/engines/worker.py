"""What runs where cells are computed: the model in memory, the output of a cell, the function that computes it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from timm_csra.accelerators import to_device

from ..checkpoints.find import Checkpoint, CheckpointError
from ..records.files import Record
from ..scoring.cells import Cell, Options
from ..scoring.loading import Loaded
from ..scoring.measure import Unfinished, begin_cell
from ..scoring.passes import Track, Turn

Compute = Callable[[Cell, Options, "Models", Track], Record | Unfinished]


def compute(cell: Cell, options: Options, models: "Models", track: Track) -> Record | Unfinished:
    """Run the images of one cell; an error in it becomes a record."""
    return begin_cell(cell, partial(models.get, cell), options, track, models.turn)


class Models:
    """The one model in memory: neighbouring cells of a checkpoint share it, those of another size too where the model
    would be built alike for it. `turn` gives a context within which the device is this process's alone."""

    def __init__(self, device: str, channels_last: bool = False, turn: Turn = nullcontext) -> None:
        self.device, self.channels_last, self.turn = device, channels_last, turn
        self._checkpoint: Checkpoint | None = None
        self._loaded: Loaded | None = None

    def get(self, cell: Cell) -> Loaded:
        if isinstance(cell.size, str):  # it could not be asked for its size; now the reason comes out
            cell.checkpoint.input_size()
            raise CheckpointError(f"could not tell the input size at first; run again for {cell.size}")
        kept = self._loaded if self._checkpoint == cell.checkpoint else None
        if kept is not None and kept.size != cell.size:
            same = cell.checkpoint.is_built_alike(kept.size, cell.size)
            self._loaded = kept = Loaded(kept.model, cell.size) if same else None
        if kept is None:
            self._loaded = None  # free the last one first
            if torch.device(self.device).type != "cpu":
                torch.accelerator.empty_cache()
            model = to_device(cell.checkpoint.create(cell.size), self.device, self.channels_last)
            self._loaded = kept = Loaded(model, cell.size)
            self._checkpoint = cell.checkpoint
        return kept


def turns(file: Path) -> Turn:
    """Let processes use a device one after the other. The system frees the lock of one that dies."""
    return lambda: FileLock(file).acquire(poll_interval=0.002)


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Everything that is printed, by C++ too, goes to the file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        kept = [os.dup(stream) for stream in (1, 2)]
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
