"""What every engine runs in its worker processes: the function that computes a cell, the loaded model, the log."""

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
    """Run the images of one cell; an error becomes the record of a failed cell."""
    return begin_cell(cell, partial(models.get, cell), options, track, models.turn)


class Models:
    """Holds the one model in memory, which successive cells of a checkpoint share.

    Cells of another size share it too if the model would be built the same way for that size. `turn` returns a context
    within which no other process uses the device.
    """

    def __init__(self, device: str, channels_last: bool = False, turn: Turn = nullcontext) -> None:
        self.device, self.channels_last, self.turn = device, channels_last, turn
        self._checkpoint: Checkpoint | None = None
        self._loaded: Loaded | None = None

    def get(self, cell: Cell) -> Loaded:
        if isinstance(cell.size, str):  # its configuration could not be read before: raise the reason now
            cell.checkpoint.input_size()
            raise CheckpointError(f"could not tell the input size at first; run again for {cell.size}")
        kept = self._loaded if self._checkpoint == cell.checkpoint else None
        if kept is not None and kept.size != cell.size:
            same = cell.checkpoint.is_built_alike(kept.size, cell.size)
            self._loaded = kept = Loaded(kept.model, cell.size) if same else None
        if kept is None:
            self._loaded = None  # free the memory of the previous model first
            if torch.device(self.device).type != "cpu":
                torch.accelerator.empty_cache()
            model = to_device(cell.checkpoint.create(cell.size), self.device, self.channels_last)
            self._loaded = kept = Loaded(model, cell.size)
            self._checkpoint = cell.checkpoint
        return kept


def turns(file: Path) -> Turn:
    """Let processes use a device one at a time. The system releases the lock of a process that dies."""
    return lambda: FileLock(file).acquire(poll_interval=0.002)


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Redirect everything that is printed, by C++ code too, to the file."""
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
