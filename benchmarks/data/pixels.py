"""Cache decoded and resized images on disk, for all checkpoints with the same preprocessing before normalisation."""

import copy
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.filesize import decimal
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, PILToTensor, ToTensor

PIXELS, ABOUT = "pixels.npy", "about.json"


@dataclass(frozen=True)
class Pixels:
    """The cached pixels of N images, `(N, H, W, 3)` uint8, which each process maps into its memory.

    Attributes:
        file: the file of the pixels.
        unreadable: indices of images that could not be read; their pixels in the file are meaningless.
    """

    file: Path
    unreadable: frozenset[int]

    def __contains__(self, index: int) -> bool:
        return index not in self.unreadable

    def tensor(self, index: int, transform: Any) -> Tensor:
        """Return the tensor `(3, H, W)` that the transform would make of the image file, bit for bit."""
        return _split(transform)[1](np.array(self._mapped[index]))

    @cached_property
    def _mapped(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the memory map, which would be copied as a whole."""
        return {"file": self.file, "unreadable": self.unreadable}


@dataclass(frozen=True)
class Entry:
    """An entry of the cache, which may not be built yet.

    Attributes:
        cache: the folder of the cache.
        data: name of the images.
        images: number of images.
        size: size of each image, `(H, W)`.
        identity: everything that the pixels depend on, as JSON values.
    """

    cache: Path
    data: str
    images: int
    size: tuple[int, int]
    identity: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of the entry; it exists once the entry is complete."""
        digest = hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{self.data}--{self._pixels}")
        return self.cache / f"{name[-100:]}--{digest}"

    @property
    def bytes(self) -> int:
        return math.prod(self._shape)

    def __str__(self) -> str:
        return f"{self.data} at {self._pixels} pixels: {decimal(self.bytes)} in {self.folder}"

    def get(self, images: Any, batch_size: int, workers: int) -> Pixels:
        """Read the entry, building it first if need be. While one process builds it, others wait.

        Args:
            images: the data set, with its transform.
            batch_size: number of images decoded at a time.
            workers: number of processes that decode.

        Raises:
            OSError: the disk is too small, or the cache cannot be written; the text names the folder.
            ValueError: the transform has no `ToTensor` step.
        """
        if found := self.read():
            return found
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{self.folder}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"{self}: waiting for another process to build it", file=sys.stderr)
                lock.acquire()
            try:
                return self.read() or self._build(images, batch_size, workers)
            finally:
                lock.release()
        except OSError as error:
            raise OSError(f"{self.folder}: cannot be built: {error}") from error

    def read(self) -> Pixels | None:
        """Read the entry; return None if it does not exist or is not valid.

        A folder with its name was complete once, but its files may have been truncated or changed since.
        """
        try:
            about = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
            kept = np.load(self.folder / PIXELS, mmap_mode="r")
            found = f"{kept.shape} {kept.dtype}"
            if (kept.shape, kept.dtype, about["identity"]) == (self._shape, np.uint8, json.loads(self._identity)):
                return Pixels(self.folder / PIXELS, frozenset(map(int, about["unreadable"])))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            found = f"an unreadable file ({type(error).__name__}: {error})"
        text = f"{self.folder}: found {found}, expected {self._shape} uint8 of {self.data}. It is built again."
        print(text, file=sys.stderr)
        return None

    def _build(self, images: Any, batch_size: int, workers: int) -> Pixels:
        """Build the entry in a temporary folder, then rename it.

        A killed build leaves only the temporary folder, which is never read and which the next build deletes.
        """
        part = self.folder.with_name(f"{self.folder.name}.part")
        for left in (part, self.folder):
            shutil.rmtree(left, ignore_errors=True)
        if (free := shutil.disk_usage(self.cache).free) < self.bytes:
            raise OSError(
                f"found {free:,} bytes free, expected {self.bytes:,}. Make room, give --cache-images another folder, "
                "or leave it out."
            )
        print(f"{self}, built once")  # for the log of the cell
        try:
            part.mkdir()
            unreadable = self._decode(part / PIXELS, images, batch_size, workers)
            why = {str(index): images.why_not(index) for index in unreadable}
            about = {"identity": json.loads(self._identity), "unreadable": why}
            (part / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
            part.rename(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # a failed build may have filled the disk
        return Pixels(self.folder / PIXELS, frozenset(unreadable))

    def _decode(self, file: Path, images: Any, batch_size: int, workers: int) -> list[int]:
        """Write the pixels, and return the indices of images that cannot be read."""
        decoded, unreadable = copy.copy(images), []
        decoded.transform = Compose([_split(images.transform)[0], PILToTensor()])
        header = {"descr": "|u1", "fortran_order": False, "shape": self._shape}
        with file.open("wb") as stream:  # a full disk raises OSError; with a memory map it would kill the process
            np.lib.format.write_array_header_2_0(stream, header)
            for batch, _, index in DataLoader(decoded, batch_size=batch_size, num_workers=workers):
                unreadable += (-1 - index[index < 0]).tolist()
                stream.write(np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy()).data)
            stream.flush()
            os.fsync(stream.fileno())
        return unreadable

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.images, *self.size, 3)

    @property
    def _pixels(self) -> str:
        height, width = self.size
        return str(height) if height == width else f"{height}x{width}"

    @cached_property
    def _identity(self) -> str:
        return json.dumps({**self.identity, "shape": self._shape}, sort_keys=True)


def _split(transform: Any) -> tuple[Compose, Compose]:
    """Split a transform into the steps before `ToTensor`, and the steps from it on."""
    steps = list(transform.transforms)
    first = next((place for place, step in enumerate(steps) if isinstance(step, ToTensor)), None)
    if first is None:
        raise ValueError(f"--cache-images: found the transform {transform}, expected one with ToTensor; leave it out.")
    return Compose(steps[:first]), Compose(steps[first:])
