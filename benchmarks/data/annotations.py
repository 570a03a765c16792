"""Read photographs with separate annotation files: COCO and Pascal VOC."""

import contextlib
import io
from pathlib import Path
from xml.etree import ElementTree

from pycocotools.coco import COCO

from .datasets import DataError, ImageSet
from .files import refuse_duplicates


def read_coco(path: Path) -> ImageSet:
    """Read COCO instances as a multi-label set. An image without annotations has no label; crowds count as labels.

    Raises:
        DataError: the file is not COCO instances, or images are missing.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its timing
        try:
            coco = COCO(str(path))
            categories = sorted(coco.cats.values(), key=lambda category: category["id"])
            images = sorted(coco.imgs.values(), key=lambda image: image["id"])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as COCO instances: {type(error).__name__}: {error}") from error
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
    for note in coco.anns.values():
        if note["category_id"] not in index:
            raise DataError(
                f"{path}: annotation {note['id']} has the category {note['category_id']}, which is none of its "
                f"{len(categories)} categories. Add the category, or remove its annotations."
            )
    labels = [
        tuple(sorted({index[note["category_id"]] for note in coco.imgToAnns.get(image["id"], ())})) for image in images
    ]
    paths = tuple(folder / image["file_name"] for image in images)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{path}: {len(missing)} of its {len(paths)} images are missing, the first one {missing[0]}.")
    refuse_duplicates((f"{path}, image {image['id']}", file) for image, file in zip(images, paths, strict=True))
    names = tuple(category["name"] for category in categories)
    return ImageSet(path.stem, paths, tuple(labels), names, multilabel=True, where=str(path.resolve()))


VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(root: Path, split: str) -> ImageSet:
    """Read a Pascal VOC year as a multi-label set.

    An image has the label of a class if at least one object of it is not `difficult`; if all are, the class is ignored
    for this image.

    Raises:
        DataError: the split, an annotation or an image is missing or cannot be read.
    """
    table = root / "ImageSets" / "Main" / f"{split}.txt"
    if not table.is_file():
        there = ", ".join(sorted(p.stem for p in table.parent.glob("*.txt") if "_" not in p.stem))
        raise DataError(f"{table}: no such file; expected one of {there} for --split.")
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
            raise DataError(f"{notes}: cannot be read as a VOC annotation: {error}") from error
        if not path.is_file():
            raise DataError(f"{table}: no such image: {path}")
        shown = {label for label, difficult in found if not difficult}
        paths.append(path)
        labels.append(tuple(sorted(shown)))
        ignored.append(tuple(sorted({label for label, _ in found} - shown)))
    refuse_duplicates((f"{table}, entry {place}", path) for place, path in enumerate(paths, start=1))
    name, where = f"{root.name}-{split}", str(root.resolve())
    return ImageSet(name, tuple(paths), tuple(labels), VOC, multilabel=True, ignored=tuple(ignored), where=where)
