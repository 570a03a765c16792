"""Read datasets that `timm.data.create_dataset` creates: those of torchvision and the Hub, and streams."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from .datasets import DataError, ImageSet, Source, state_of_file

PREFIXES = ("torch/", "hfds/")
OWN_ORDER = "the indices of the dataset, as timm's train script has them"
STREAMS = ("hfids/", "wds/", "tfds/")


class Items:
    """Items of a reader or dataset of timm or torchvision: pairs of an image, or of a file with one, and a target."""

    def __init__(self, items: Any, indices: tuple[int, ...]) -> None:
        self.items, self.indices = items, indices

    def open(self, index: int) -> Any:
        return self.items[self.indices[index]][0]


def read_stream(spec: str, split: str | None, data_dir: str | None) -> ImageSet:
    """Read one of timm's iterable datasets. Its labels are indices of the head if it has no class names."""
    dataset = _create(spec, split, data_dir)
    reader = dataset.reader
    names = getattr(reader, "class_to_idx", None) or {}
    by_index = {index: name for name, index in names.items()}
    classes = tuple(str(by_index.get(index, index)) for index in range(len(by_index)))
    source = Source(partial(_create, spec, split, data_dir), len(dataset))
    name, where = f"{spec}:{split or 'validation'}", _where(spec, data_dir)
    if spec.lower().startswith("wds/"):
        content = _states(Path(data_dir or "."), (Path(data_dir or ".", name) for name in reader.split_info.filenames))
    elif spec.lower().startswith("tfds/"):
        content = _states(Path(reader.builder.data_dir), Path(reader.builder.data_dir).rglob("*"))
    else:
        content = _of_builder(reader.builder)
    return ImageSet(name, (), (), classes, stream=source, where=where, content=content, order=OWN_ORDER)


def read_by_timm(spec: str, split: str | None, data_dir: str | None) -> ImageSet:
    """Read a dataset of torchvision or the Hub."""
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
    store = Items(reader if reader is not None else dataset, tuple(range(len(labels))))
    content = _of_torchvision(dataset) if reader is None else _of_table(reader.dataset)
    where = _where(spec, data_dir)
    return ImageSet(
        spec, stems, labels, classes, multilabel=several, store=store, where=where, content=content, order=OWN_ORDER
    )


def _create(spec: str, split: str | None, data_dir: str | None) -> Any:
    """Call `timm.data.create_dataset`; raises DataError if it fails."""
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


def _where(spec: str, data_dir: str | None) -> str | None:
    """Return the folder of a dataset, or None. For the Hub's datasets `data_dir` is only a cache."""
    prefix, _, name = spec.partition("/")
    if prefix.lower() in ("hfds", "hfids"):
        return str(Path(name).resolve()) if Path(name).is_dir() else None
    return str(Path(data_dir).resolve()) if data_dir else None


def _states(root: Path, files: Iterable[Path]) -> str:
    """Fingerprint files by size and time; others, such as shards at a URL, by their name."""
    every = sorted(file for file in files if not file.is_dir())
    return repr([(str(f.relative_to(root)), state_of_file(f)) if f.is_file() else (str(f), "") for f in every])


def _of_torchvision(dataset: Any) -> tuple[str, ...] | str:
    """Fingerprint each photograph if they are single files, else all files in the dataset's folder."""
    samples = getattr(dataset, "samples", None)
    if samples:
        return tuple(f"{path} {state_of_file(Path(path))}" for path, *_ in samples)
    root = Path(dataset.root) / getattr(dataset, "base_folder", "")
    return _states(root, root.rglob("*"))


def _of_table(table: Any) -> str:
    """Fingerprint a dataset of the Hub by its tables in the cache, whose names have a hash of their source files."""
    files = [Path(file["filename"]) for file in table.cache_files]
    return repr([("/".join(file.parts[-4:]), file.stat().st_size) for file in files])


def _of_builder(builder: Any) -> str:
    """Fingerprint a stream of the Hub by the commit of its repository, or by the time of each of its files."""
    files = builder.config.data_files or {}
    return repr([(split, list(map(str, found)), found.origin_metadata) for split, found in sorted(files.items())])
