"""Decide whether a cell applies: whether its data and task suit the checkpoint's head.

The data, the options and the checkpoint's configuration decide it before weights are downloaded or loaded. The loaded
model is checked again, since its classifier may have been replaced.
"""

from dataclasses import replace

from ..data.classes import Alignment, Classifier, NotApplicableError, align
from ..data.datasets import ImageSet, real_labels
from .cells import Cell, Options, show_size


class Applicability:
    """Decides why cells do not apply, once for all checkpoints that declare the same classes.

    Matching classes with the labels of 50,000 images takes longer than reading a configuration.

    Args:
        options: how the cells are run.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._data: dict[int, ImageSet] = {}  # kept, so that ids stay unique
        self._reasons: dict[tuple[object, ...], str | None] = {}

    def why_not(self, cell: Cell, build: bool = True) -> str | None:
        """Return why a cell does not apply; None if it applies, or if only the loaded model can tell.

        Args:
            cell: the cell.
            build: also check that the model can be built for a size other than its own. This builds it, without
                weights, and takes a second or more for each checkpoint.
        """
        if reason := self._by_configuration(cell):
            return reason
        if not build or self._options.rescore or isinstance(cell.size, str):
            return None
        why = cell.checkpoint.why_not_at(cell.size)
        return f"the model cannot be built for {show_size(cell.size)} pixels: {why}" if why else None

    def _by_configuration(self, cell: Cell) -> str | None:
        checkpoint, classifier = cell.checkpoint, None
        try:
            if cell.own is not None:  # else its configuration cannot be read
                classifier = Classifier.of(checkpoint.num_classes(), checkpoint.pretrained_cfg)
            asked = (id(cell.data), cell.task, cell.grid, classifier, checkpoint.training_order)
            if asked not in self._reasons:
                self._data[id(cell.data)] = cell.data
                self._reasons[asked] = _why_not(cell, self._options, classifier)
            return self._reasons[asked]
        except (ValueError, TypeError):  # an invalid configuration: loading the checkpoint fails and records why
            return None


def _why_not(cell: Cell, options: Options, classifier: Classifier | None) -> str | None:
    try:
        if classifier is None:
            data_for_task(cell)
        else:
            match_classes(cell, options, classifier)
    except NotApplicableError as reason:
        return str(reason)
    return None


def match_classes(cell: Cell, options: Options, classifier: Classifier) -> tuple[ImageSet, Alignment]:
    """Return the data with the task's labels, and which outputs of the head are scored.

    Raises:
        NotApplicableError: the data does not suit the task, or its classes are not among the head's.
    """
    data = data_for_task(cell)
    if not classifier.count:
        raise NotApplicableError("the checkpoint has no classifier (num_classes=0)")
    if (order := cell.checkpoint.training_order) and options.class_names is None:
        raise NotApplicableError(
            f"the checkpoint was trained with --class-map {order}: give that to --class-names, one name a line in the "
            "order of the head"
        )
    labels = [range(len(data.classes))] if data.stream else data.labels
    if data.stream and not data.classes:  # labels without names are indices of the head
        data = replace(data, classes=tuple(map(str, range(classifier.count))))
    class_map = options.class_map if cell.task == "multilabel" else None
    whole = options.score_classes == "head"
    return data, align(data.classes, labels, classifier, class_map, options.class_names, data.order, whole)


def data_for_task(cell: Cell) -> ImageSet:
    """Return the data, with ReaL labels for the task `real`; raises NotApplicableError if it does not suit the task."""
    data = cell.data
    if cell.task != "single" and data.stream:
        raise NotApplicableError("a stream has no list of its images: it is scored by the task single alone")
    if cell.task == "single" and data.multilabel:
        raise NotApplicableError("the task single needs exactly one label for each image")
    if cell.task == "multilabel" and not data.multilabel:
        raise NotApplicableError(
            "the task multilabel needs several labels for each image: labels.csv with a column "
            "`labels`, COCO or VOC annotations"
        )
    if cell.task == "mosaic" and data.multilabel and data.tilings is None:
        raise NotApplicableError("mosaics are built from images with exactly one label each")
    if cell.grid and not cell.images:
        raise NotApplicableError(f"{len(data)} images are too few for one mosaic of {cell.grid}x{cell.grid}")
    return real_labels(data) if cell.task == "real" else data
