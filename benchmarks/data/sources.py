"""Read photographs and labels from folders, archives, tables, COCO, Pascal VOC, or datasets of timm."""

from pathlib import Path

from .annotations import read_coco, read_voc
from .archives import read_archive
from .datasets import DataError, ImageSet
from .files import read_csv, read_image_folder
from .hubs import PREFIXES, STREAMS, read_by_timm, read_stream

HELP = """
data:
  FOLDER            an ImageFolder (one folder per class, named by synset, label, or index of the head; or one for each
                    class of the head, in the natural order of timm's train script), or a folder with images/,
                    labels.csv (columns `file`, and `label` with one index or `labels` with several separated by
                    spaces) and classes.txt (`index name`)
  FILE.tar, .zip    an ImageFolder in an archive
  instances_X.json  COCO annotations; the images may be in X/, images/ or images/X/, beside the file or a folder above
  VOCdevkit/VOC2007 a Pascal VOC year; --split is a file of ImageSets/Main (default: test)
  torch/NAME, hfds/NAME
                    a dataset of torchvision or the Hub, by its name for timm.data.create_dataset; see --data-dir,
                    --split
  hfids/NAME, wds/NAME, tfds/NAME
                    a stream, by its name for timm.data.create_dataset; only for the task single
"""


NO_CLASS = ""  # readers of folders and archives return this class for pictures outside of class folders


def load_image_set(
    spec: str | Path, limit: int | None = None, split: str | None = None, data_dir: str | None = None, seed: int = 0
) -> ImageSet:
    """Read one of the forms in `HELP`, or a random sample of `limit` photographs.

    Raises:
        DataError: the data cannot be read; the text names the file, what was found and what was expected.
    """
    images = _read(str(spec), split, data_dir)
    if NO_CLASS in images.classes:
        nameless = (images.classes.index(NO_CLASS),)
        loose = [path.name for path, labels in zip(images.paths, images.labels, strict=True) if labels == nameless]
        raise DataError(
            f"{spec}: found {len(loose)} of {len(images)} pictures in no class folder, such as {loose[0]}; expected a "
            "folder for each class, or labels.csv; benchmarks.tune --without-labels needs neither."
        )
    return images.sample(limit, seed)


def load_pictures(
    spec: str | Path, limit: int | None = None, split: str | None = None, data_dir: str | None = None, seed: int = 0
) -> ImageSet:
    """Read pictures without labels, from the forms of `load_image_set`; of a folder, all pictures in it.

    Raises:
        DataError: there is no picture, or the data is a stream, which has no list of its pictures.
    """
    path = Path(spec)
    if str(spec).lower().startswith(STREAMS):
        raise DataError(f"{spec}: a stream has no list of its pictures; expected a folder, an archive or annotations.")
    folder = path.is_dir() and not (path / "ImageSets" / "Main").is_dir()
    return (read_image_folder(path) if folder else _read(str(spec), split, data_dir)).sample(limit, seed)


def _read(spec: str, split: str | None, data_dir: str | None) -> ImageSet:
    path = Path(spec)
    if spec.lower().startswith(STREAMS):
        return read_stream(spec, split, data_dir)
    if spec.lower().startswith(PREFIXES):
        return read_by_timm(spec, split, data_dir)
    if path.suffix == ".json" and path.is_file():
        return read_coco(path)
    if path.suffix in (".tar", ".zip") and path.is_file():
        return read_archive(path)
    if not path.is_dir():
        raise DataError(
            f"{spec}: no such folder, archive or annotations; expected an ImageFolder, images/ with labels.csv and "
            f"classes.txt, a .tar or .zip, COCO's .json, a VOC year, or {', '.join(PREFIXES)}NAME."
        )
    if (path / "ImageSets" / "Main").is_dir():
        return read_voc(path, split or "test")
    return read_csv(path) if (path / "labels.csv").is_file() else read_image_folder(path)
