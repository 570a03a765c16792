"""Where photographs and labels come from: folders, archives, tables, COCO, Pascal VOC, timm's own datasets."""

import contextlib
import csv
import io
import tarfile
import zipfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from pycocotools.coco import COCO
from timm.data import create_dataset, create_reader
from timm.data.readers.img_extensions import is_img_extension
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils import natural_key

from timm_csra.trained import read_class_names

from .datasets import DataError, ImageSet, Source

PREFIXES = ("torch/", "hfds/")
STREAMS = ("hfids/", "wds/", "tfds/")
NATURAL_ORDER = "the natural order of the folders, as timm's train script has them"
OWN_ORDER = "the indices of the dataset, as timm's train script has them"

HELP = """
data:
  FOLDER            an ImageFolder (one folder per class, named by synset, label, or index of the head; or one for each
                    class of the head, in the natural order that timm's train script takes), or a folder with images/,
                    labels.csv (columns `file`, and `label` with one index or `labels` with several separated by
                    spaces) and classes.txt (`index name`)
  FILE.tar, .zip    an ImageFolder in an archive
  instances_X.json  COCO annotations; the images are looked for in X/, ../X/ and images/ beside and above the file
  VOCdevkit/VOC2007 a Pascal VOC year; --split is a file of ImageSets/Main (default: test)
  torch/NAME, hfds/NAME
                    a dataset of torchvision or the Hub, as timm.data.create_dataset takes it; see --data-dir, --split
  hfids/, wds/, tfds/
                    a stream, likewise; for the task single
"""


def load_image_set(
    spec: str | Path, limit: int | None = None, split: str | None = None, data_dir: str | None = None
) -> ImageSet:
    """Read one of the forms in `HELP`; `limit` takes the first photographs, in the order of the source.

    Raises:
        DataError: nothing that can be read; the text names the file, what was found and what was expected.
    """
    return _read(str(spec), split, data_dir).first(limit)


def load_pictures(
    spec: str | Path, limit: int | None = None, split: str | None = None, data_dir: str | None = None
) -> ImageSet:
    """As `load_image_set`, where labels are not asked for: a folder is all pictures in it, whatever else it holds.

    Raises:
        DataError: no picture, or a stream, which has no list of its pictures.
    """
    path = Path(spec)
    if str(spec).lower().startswith(STREAMS):
        raise DataError(f"{spec}: a stream has no list of its pictures; expected a folder, an archive or annotations.")
    folder = path.is_dir() and not (path / "ImageSets" / "Main").is_dir()
    return (_read_image_folder(path) if folder else _read(str(spec), split, data_dir)).first(limit)


def _read(spec: str, split: str | None, data_dir: str | None) -> ImageSet:
    path = Path(spec)
    if spec.lower().startswith(STREAMS):
        return _read_stream(spec, split, data_dir)
    if spec.lower().startswith(PREFIXES):
        return _read_timm(spec, split, data_dir)
    if path.suffix == ".json" and path.is_file():
        return _read_coco(path)
    if path.suffix in (".tar", ".zip") and path.is_file():
        return _read_archive(path)
    if not path.is_dir():
        raise DataError(
            f"{spec}: no such folder, archive or annotations; expected an ImageFolder, images/ with labels.csv and "
            f"classes.txt, a .tar or .zip, COCO's .json, a VOC year, or {', '.join(PREFIXES)}NAME."
        )
    if (path / "ImageSets" / "Main").is_dir():
        return _read_voc(path, split or "test")
    return _read_csv(path) if (path / "labels.csv").is_file() else _read_image_folder(path)


class _Reader:
    """A reader or dataset of timm or torchvision: items are pairs of an image, or a file with one, and a target."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def open(self, index: int) -> Any:
        return self.items[index][0]


class _Zip:
    """Members of a zip file, which each process opens for itself."""

    def __init__(self, path: Path, members: tuple[str, ...]) -> None:
        self.path, self.members = path, members

    def open(self, index: int) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            return io.BytesIO(archive.read(self.members[index]))


def _read_archive(path: Path) -> ImageSet:
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                found = [PurePosixPath(name) for name in archive.namelist()]
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: cannot be read as a zip file: {error}") from error
        images = sorted(
            (name for name in found if is_img_extension(name.suffix.lower())), key=lambda n: natural_key(str(n))
        )
        if not images:
            raise DataError(f"{path}: no image in it; expected one folder per class.")
        classes = tuple(sorted({name.parent.name for name in images}, key=natural_key))
        labels = tuple((classes.index(name.parent.name),) for name in images)
        store = _Zip(path, tuple(map(str, images)))
        return ImageSet(path.stem, tuple(map(Path, store.members)), labels, classes, store=store, order=NATURAL_ORDER)
    try:
        # The index of the archive is not written beside it.
        reader = ReaderImageInTar(str(path), cache_tarinfo=False, cache_tarfiles=False)
    except (tarfile.TarError, ValueError) as error:  # no image in it is a ValueError of timm's
        raise DataError(f"{path}: cannot be read as a tar file of images: {error}") from error
    classes = tuple(reader.class_idx_to_name[index] for index in range(len(reader.class_idx_to_name)))
    names = tuple(Path(reader.filename(index)) for index in range(len(reader)))
    labels = tuple((int(target),) for target in reader.targets)
    return ImageSet(path.stem, names, labels, classes, store=_Reader(reader), order=NATURAL_ORDER)


def _read_stream(spec: str, split: str | None, data_dir: str | None) -> ImageSet:
    """timm's iterable datasets; classes without names are indices of the head."""
    dataset = _create(spec, split, data_dir)
    names = getattr(dataset.reader, "class_to_idx", None) or {}
    by_index = {index: name for name, index in names.items()}
    classes = tuple(str(by_index.get(index, index)) for index in range(len(by_index)))
    source = Source(partial(_create, spec, split, data_dir), len(dataset))
    return ImageSet(f"{spec}:{split or 'validation'}", (), (), classes, stream=source, order=OWN_ORDER)


def _create(spec: str, split: str | None, data_dir: str | None) -> Any:
    """timm's own factory; what it cannot do is a DataError."""
    try:
        return create_dataset(spec, root=data_dir, split=split or "validation")
    except (ImportError, OSError, RuntimeError, ValueError, AssertionError, TypeError, NameError) as error:
        package = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}
        name = package.get(spec.partition("/")[0].lower())
        hint = f"pip install {name}. " if name and isinstance(error, (ImportError, NameError)) else ""
        raise DataError(
            f"{spec}: timm.data.create_dataset with split={split or 'validation'!r} and root={data_dir!r}: "
            f"{type(error).__name__}: {error}. {hint}See --split and --data-dir."
        ) from error


def _read_timm(spec: str, split: str | None, data_dir: str | None) -> ImageSet:
    """torchvision's and the Hub's datasets, by timm's own factory."""
    dataset = _create(spec, split, data_dir)
    reader = getattr(dataset, "reader", None)
    if reader is not None:
        targets, names = list(reader.iter_targets()), reader.class_to_idx
    else:
        targets, names = list(getattr(dataset, "targets", ())), getattr(dataset, "class_to_idx", {})
    if len(targets) != len(dataset):
        raise DataError(f"{spec}: its {type(dataset).__name__} does not list its targets; expected one that does.")
    several = any(isinstance(target, (list, tuple)) for target in targets)
    labels = tuple(tuple(map(int, t)) if isinstance(t, (list, tuple)) else (int(t),) for t in targets)
    highest = max((label for found in labels for label in found), default=-1)
    by_index = {index: name for name, index in names.items()}
    classes = tuple(str(by_index.get(index, index)) for index in range(max(highest + 1, len(by_index))))
    stems = tuple(Path(f"{split or 'validation'}/{index}") for index in range(len(labels)))
    store = _Reader(reader if reader is not None else dataset)
    return ImageSet(spec, stems, labels, classes, multilabel=several, store=store, order=OWN_ORDER)


def _read_coco(path: Path) -> ImageSet:
    """Which of the categories an image shows; images without annotation have no label. Crowds count as shown."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
        try:
            coco = COCO(str(path))
            categories = sorted(coco.cats.values(), key=lambda category: category["id"])
            images = sorted(coco.imgs.values(), key=lambda image: image["id"])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: no COCO instances: {type(error).__name__}: {error}") from error
    if not images or not categories:
        raise DataError(
            f"{path}: found {len(images)} images and {len(categories)} categories; expected COCO instances."
        )
    part = path.stem.removeprefix("instances_")
    folders = [
        base / name for base in (path.parent, path.parent.parent) for name in (part, "images", f"images/{part}", ".")
    ]
    name = images[0]["file_name"]
    folder = next((folder for folder in folders if (folder / name).is_file()), None)
    if folder is None:
        raise DataError(f"{path}: its image {name} is in none of {', '.join(map(str, folders))}.")
    index = {category["id"]: position for position, category in enumerate(categories)}
    labels = [
        tuple(sorted({index[note["category_id"]] for note in coco.imgToAnns.get(image["id"], ())})) for image in images
    ]
    paths = tuple(folder / image["file_name"] for image in images)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{path}: {len(missing)} of its {len(paths)} images are not there, the first {missing[0]}.")
    return ImageSet(
        path.stem, paths, tuple(labels), tuple(category["name"] for category in categories), multilabel=True
    )


VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _read_voc(root: Path, split: str) -> ImageSet:
    """An image shows a class where one of its objects is not `difficult`; where all are, it is not judged."""
    table = root / "ImageSets" / "Main" / f"{split}.txt"
    if not table.is_file():
        there = ", ".join(sorted(p.stem for p in table.parent.glob("*.txt") if "_" not in p.stem))
        raise DataError(f"{table}: no such file; expected --split to be one of {there}.")
    paths, labels, ignored = [], [], []
    for name in table.read_text(encoding="utf-8").split():
        notes = root / "Annotations" / f"{name}.xml"
        path = root / "JPEGImages" / f"{name}.jpg"
        try:
            objects = ElementTree.parse(notes).getroot().findall("object")
            found = [
                (VOC.index(o.findtext("name", "").strip()), o.findtext("difficult", "0").strip() == "1")
                for o in objects
            ]
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise DataError(f"{notes}: no VOC annotation: {error}") from error
        if not path.is_file():
            raise DataError(f"{table}: no such image: {path}")
        shown = {label for label, difficult in found if not difficult}
        paths.append(path)
        labels.append(tuple(sorted(shown)))
        ignored.append(tuple(sorted({label for label, _ in found} - shown)))
    return ImageSet(f"{root.name}-{split}", tuple(paths), tuple(labels), VOC, multilabel=True, ignored=tuple(ignored))


def _read_image_folder(root: Path) -> ImageSet:
    try:
        reader = create_reader("", root=str(root))
    except RuntimeError as error:
        raise DataError(f"{root}: neither labels.csv nor an ImageFolder was found: {error}") from error
    paths, labels = zip(*reader.samples, strict=True)
    classes = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.get))
    every = tuple((label,) for label in labels)
    return ImageSet(root.resolve().name, tuple(map(Path, paths)), every, classes, order=NATURAL_ORDER)


def _read_csv(root: Path) -> ImageSet:
    try:
        classes = read_class_names(root / "classes.txt")
    except ValueError as error:
        raise DataError(str(error)) from error
    table = root / "labels.csv"
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        rows = list(reader)
    column = next((name for name in ("label", "labels") if name in columns), None)
    if column is None or "file" not in columns:
        raise DataError(f"{table}: found the columns {', '.join(columns)}; expected file and one of label, labels.")
    if not rows:
        raise DataError(f"{table}: no row; expected one for each image.")
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
    return ImageSet(
        root.resolve().name,
        tuple(paths),
        tuple(labels),
        classes,
        multilabel=column == "labels",
        order="the order of classes.txt",
    )
