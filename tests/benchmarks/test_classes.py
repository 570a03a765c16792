"""Matching the classes of the data with those of a head, and the text of what cannot be matched."""

from types import SimpleNamespace

import pytest

from benchmarks.classes import NotApplicableError, align


def head(names: list[str] | None, count: int | None = None, descriptions: dict | None = None) -> object:
    cfg = {"label_names": names, "label_descriptions": descriptions}
    return SimpleNamespace(num_classes=count or len(names or ()), pretrained_cfg=cfg)


IMAGENET = head(None, 1000)
ALIGNED = [
    # (data classes, labels that occur, head, scored columns of the head)
    (["n01440764 tench, Tinca tinca", "n01443537 goldfish"], [0, 1], IMAGENET, (0, 1)),
    (["n01443537", "n01440764"], [0, 1], IMAGENET, (0, 1)),
    (["n01440764 tench"], [0], head(["x", "n01440764"]), (1,)),
    (["n01440764 tench", "n99999999 unknown"], [0], IMAGENET, (0,)),  # declared, never seen: not scored
    (["golden_retriever", "Tench"], [0, 1], IMAGENET, (0, 207)),
    (["cat", "dog"], [0, 1], head(["dog", "cat", "bird"]), (0, 1)),
    (["n01440764 tench, Tinca tinca"], [0], head(["tench, Tinca tinca"]), (0,)),
    (["tench"], [0], head(["n01440764"], descriptions={"n01440764": "tench, Tinca tinca"}), (0,)),
    (["n02012849 crane", "n03126707 crane"], [0, 1], IMAGENET, (134, 517)),
    (["n01440764"], [0], head(None, 21843), (None,)),
]


@pytest.mark.parametrize(("classes", "labels", "model", "columns"), ALIGNED)
def test_classes_are_aligned(classes: list[str], labels: list[int], model: object, columns: tuple) -> None:
    alignment = align(classes, [labels], model)  # type: ignore[arg-type]
    if columns != (None,):
        assert alignment.columns == columns
    assert set(alignment.positions) >= set(labels)


def test_every_label_meets_the_column_of_its_class() -> None:
    alignment = align(["cat", "dog"], [[0], [1]], head(["dog", "bird", "cat"]))  # type: ignore[arg-type]
    assert {index: alignment.columns[place] for index, place in alignment.positions.items()} == {0: 2, 1: 0}


@pytest.mark.parametrize(
    ("classes", "model", "text"),
    [
        (["n01440764 tench", "zebra fish"], IMAGENET, "1 classes of the data are not among the head's: zebra fish"),
        (["crane"], IMAGENET, "1 classes of the data are not among the head's: crane"),  # two classes have that name
        (["n02012849 crane"], head(["n03126707"], descriptions={"n03126707": "crane"}), "head's: n02012849 crane"),
        (["a"], head(None, 37), "the names of the head's 37 classes are unknown: expected label_names in config.json"),
        (["a"], head(["a", "b"], 3), "the names of the head's 3 classes are unknown"),
    ],
)
def test_what_cannot_be_aligned(classes: list[str], model: object, text: str) -> None:
    with pytest.raises(NotApplicableError, match=text):
        align(classes, [range(len(classes))], model)  # type: ignore[arg-type]
