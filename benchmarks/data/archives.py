"""Read an ImageFolder in a .zip or .tar file, without unpacking it."""

import io
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils import natural_key

from .datasets import DataError, ImageSet, state_of_file
from .files import NATURAL_ORDER, by_class, is_photograph
from .hubs import Items


class _Zip:
    """Members of a zip file. Each process opens the file for itself."""

    def __init__(self, path: Path, members: tuple[str, ...]) -> None:
        self.path, self.members = path, members

    def open(self, index: int) -> io.BytesIO:
        with zipfile.ZipFile(self.path) as archive:
            return io.BytesIO(archive.read(self.members[index]))


def read_archive(path: Path) -> ImageSet:
    """Read the images of an archive; the folder that an image is in is its class.

    Raises:
        DataError: the file cannot be read as an archive, or contains no image.
    """
    return _read_zip(path) if path.suffix == ".zip" else _read_tar(path)


def _read_zip(path: Path) -> ImageSet:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: f"{info.CRC} {info.file_size}" for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: cannot be read as a zip file: {error}") from error
    names = sorted((name for name in members if is_photograph(PurePosixPath(name))), key=natural_key)
    if not names:
        raise DataError(f"{path}: found no image; expected one folder per class.")
    found = [(Path(name), PurePosixPath(name).parent.name) for name in names]
    paths, classes, labels = by_class(found, sorted({folder for _, folder in found}, key=natural_key))
    content = tuple(members[name] for name in names)
    store = _Zip(path, tuple(names))
    return ImageSet(
        path.stem, paths, labels, classes, store=store, where=str(path.resolve()), content=content, order=NATURAL_ORDER
    )


def _read_tar(path: Path) -> ImageSet:
    """Read a tar file. It has no checksums of its members: the fingerprint uses the size and time of the file."""
    try:
        # Without the cache options timm would write an index of the archive beside it.
        reader = ReaderImageInTar(str(path), cache_tarinfo=False, cache_tarfiles=False)
    except (tarfile.TarError, ValueError) as error:  # timm raises ValueError if there is no image
        raise DataError(f"{path}: cannot be read as a tar file of images: {error}") from error
    names = reader.class_idx_to_name
    every = [(Path(reader.filename(index)), names[target]) for index, target in enumerate(map(int, reader.targets))]
    kept = [index for index, (name, _) in enumerate(every) if is_photograph(name)]
    if not kept:
        raise DataError(f"{path}: found hidden images only; expected one folder per class.")
    paths, classes, labels = by_class([every[index] for index in kept], [names[index] for index in range(len(names))])
    store, where = Items(reader, tuple(kept)), str(path.resolve())
    return ImageSet(
        path.stem, paths, labels, classes, store=store, where=where, content=state_of_file(path), order=NATURAL_ORDER
    )
