"""Where photographs and labels come from: folders, archives, tables, COCO, Pascal VOC, timm's own datasets."""

from pathlib import Path

from .annotations import read_coco, read_voc
from .archives import read_archive
from .datasets import DataError, ImageSet
from .files import read_csv, read_image_folder
from .hubs import PREFIXES, STREAMS, read_by_timm, read_stream

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
    spec: str | Path, limit: int | None = None, split: str | None = None, data_dir: str | None = None, seed: int = 0
) -> ImageSet:
    """Read one of the forms in `HELP`; of `limit` photographs, a sample drawn by the seed.

    Raises:
        DataError: nothing that can be read; the text names the file, what was found and what was expected.
    """
    return _read(str(spec), split, data_dir).sample(limit, seed)


def load_pictures(
    spec: str | Path, limit: int | None = None, split: str | None = None, data_dir: str | None = None, seed: int = 0
) -> ImageSet:
    """As `load_image_set`, where labels are not asked for: a folder is all pictures in it, whatever else it holds.

    Raises:
        DataError: no picture, or a stream, which has no list of its pictures.
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
