"""Read folders of photographs, with a folder for each class or a table of labels."""

import csv
from collections.abc import Iterable
from pathlib import Path, PurePath

from PIL import Image, ImageFile
from timm.data import create_reader
from timm.data.readers.img_extensions import set_img_extensions

from timm_csra.trained import read_class_names

from .datasets import DataError, ImageSet

NATURAL_ORDER = "the natural order of the folders, as timm's train script has them"

_WITHOUT_PIXELS = ("EPS", "MPEG")  # Pillow needs Ghostscript for EPS, and cannot decode MPEG


def _readable_formats() -> tuple[str, ...]:
    """Return the extensions, such as `.jpg`, of formats that Pillow can decode; some others it can only identify."""
    endings = Image.registered_extensions()  # this loads the plugins
    known = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if name not in _WITHOUT_PIXELS
        and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    }
    return tuple(sorted(ending for ending, name in endings.items() if name in known))


EXTENSIONS = _readable_formats()
set_img_extensions(EXTENSIONS)  # for timm's readers of folders and tar files


def is_photograph(name: PurePath) -> bool:
    """Whether a file of a folder or archive is a picture by its extension, and neither hidden nor macOS metadata."""
    hidden = any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.parts)
    return name.suffix.lower() in EXTENSIONS and not hidden


def refuse_duplicates(photographs: Iterable[tuple[str, Path]]) -> None:
    """Raise an error if a photograph is listed more than once.

    Args:
        photographs: for each photograph the place that lists it, such as a line of a table, and its file.

    Raises:
        DataError: a file is listed twice; the text names the places.
    """
    places: dict[Path, list[str]] = {}
    for where, path in photographs:
        places.setdefault(path, []).append(where)
    if twice := {path: found for path, found in places.items() if len(found) > 1}:
        path, found = next(iter(twice.items()))
        more = f", and {len(twice) - 1} more files" if len(twice) > 1 else ""
        raise DataError(f"{path}: listed {len(found)} times: {'; '.join(found[:5])}{more}. Expected each image once.")


def read_image_folder(root: Path) -> ImageSet:
    try:
        reader = create_reader("", root=str(root))
        samples = [(Path(path), target) for path, target in reader.samples]
    except RuntimeError as error:
        raise DataError(f"{root}: neither labels.csv nor an ImageFolder was found: {error}") from error
    samples = [(path, target) for path, target in samples if is_photograph(path.relative_to(root))]
    if not samples:
        raise DataError(f"{root}: neither labels.csv nor an ImageFolder was found: every image in it is hidden.")
    names = {index: name for name, index in reader.class_to_idx.items()}
    paths, classes, labels = by_class([(path, names[target]) for path, target in samples], list(reader.class_to_idx))
    return ImageSet(root.resolve().name, paths, labels, classes, where=str(root.resolve()), order=NATURAL_ORDER)


def by_class(
    found: list[tuple[Path, str]], order: list[str]
) -> tuple[tuple[Path, ...], tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Return the paths of the photographs, the classes in the given order, and the labels of each photograph."""
    present = {name for _, name in found}
    classes = tuple(name for name in order if name in present)
    index = {name: place for place, name in enumerate(classes)}
    return tuple(path for path, _ in found), classes, tuple((index[name],) for _, name in found)


def read_csv(root: Path) -> ImageSet:
    try:
        classes = read_class_names(root / "classes.txt")
    except ValueError as error:
        raise DataError(str(error)) from error
    table = root / "labels.csv"
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        rows = list(reader)
    column = next((name for name in ("label", "labels") if name in columns), None)
    if column is None or "file" not in columns:
        raise DataError(f"{table}: found the columns {', '.join(columns)}; expected file and one of label, labels.")
    if not rows:
        raise DataError(f"{table}: found no row; expected one for each image.")
    paths, labels = [], []
    for line, row in enumerate(rows, start=2):
        where = f"{table}, line {line}"
        try:
            found = tuple(sorted({int(label) for label in (row[column] or "").split()}))
        except ValueError:
            raise DataError(f"{where}: found {column}={row[column]!r}; expected indices into classes.txt.") from None
        if column == "label" and len(found) != 1:
            raise DataError(f"{where}: found label={row[column]!r}; expected one index (several go into labels).")
        if not all(0 <= label < len(classes) for label in found):
            raise DataError(f"{where}: found {column}={row[column]!r}; classes.txt has {len(classes)} classes.")
        path = root / (row["file"] or "")
        if not path.is_file():
            raise DataError(f"{where}: no such file: {path}")
        paths.append(path)
        labels.append(found)
    refuse_duplicates((f"{table}, line {line}", path.resolve()) for line, path in enumerate(paths, start=2))
    several = column == "labels"
    return ImageSet(
        root.resolve().name,
        tuple(paths),
        tuple(labels),
        classes,
        multilabel=several,
        where=str(root.resolve()),
        order="the order of classes.txt",
    )
