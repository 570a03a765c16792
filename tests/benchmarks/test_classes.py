"""Matching the classes of the data with those of a head, and the text of what cannot be matched."""

import pkgutil
from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo

from benchmarks.data.classes import Classifier, ClassNames, NotApplicableError, align, combined, load_class_map


def head(names: list[str] | None, count: int | None = None, descriptions: dict | None = None) -> Classifier:
    cfg = {"label_names": names, "label_descriptions": descriptions}
    return Classifier.of(count or len(names or ()), cfg)


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
def test_classes_are_aligned(classes: list[str], labels: list[int], model: Classifier, columns: tuple) -> None:
    alignment = align(classes, [labels], model)
    if columns != (None,):
        assert alignment.columns == columns
    assert set(alignment.positions) >= set(labels)


def test_the_width_of_the_logits_counts_where_num_classes_is_stale() -> None:
    stale = {"label_names": ["dog", "bird", "cat"], "num_classes": 1000}
    with pytest.raises(NotApplicableError, match="the names of the head's 1000 classes are unknown"):
        align(["cat", "dog"], [[0], [1]], Classifier.of(1000, stale))
    assert align(["cat", "dog"], [[0], [1]], Classifier.of(3, stale)).columns == (0, 2)
    with pytest.raises(NotApplicableError, match="the names of the head's 20 classes are unknown"):
        align(["tench"], [[0]], Classifier.of(20, {"num_classes": 1000}))


def test_given_names_come_before_those_of_the_checkpoint() -> None:
    given = ClassNames("names.txt", ("n02123045 tabby", "dog", "cat"))
    alignment = align(["cat", "dog"], [[0], [1]], head(["cat", "dog", "bird"]), given=given)
    assert (alignment.columns, alignment.positions, alignment.classes_from) == ((1, 2), {0: 1, 1: 0}, "names.txt")
    assert align(["n02123045"], [[0]], head(None, 3), given=given).columns == (0,)
    with pytest.raises(NotApplicableError, match="names.txt has 3 names, and the head 4 classes"):
        align(["cat"], [[0]], head(None, 4), given=given)


@pytest.mark.parametrize(
    ("classes", "order", "positions"),
    [
        (["a", "b", "c"], "folders", {0: 0, 1: 1, 2: 2}),
        (["2", "0", "1"], None, {0: 2, 1: 0, 2: 1}),
        (["2", "0", "1"], "classes.txt", {0: 2, 1: 0, 2: 1}),  # numbers say more than their order
        (["1", "2", "3"], "folders", {0: 0, 1: 1, 2: 2}),  # counted from one
        (["00", "01", "02"], "folders", {0: 0, 1: 1, 2: 2}),
    ],
)
def test_classes_by_position(classes: list[str], order: str | None, positions: dict) -> None:
    alignment = align(classes, [range(3)], head(None, 3), order=order)
    assert {index: alignment.columns[place] for index, place in alignment.positions.items()} == positions


@pytest.mark.parametrize(
    ("classes", "order"),
    [(["a", "b", "c"], None), (["a", "b"], "folders"), (["0", "1"], "folders"), (["1", "2"], "folders"), ([], "x")],
)
def test_positions_are_not_guessed(classes: list[str], order: str | None) -> None:
    with pytest.raises(NotApplicableError, match=r"the head's 3 classes are unknown, and the data has \d classes"):
        align(classes, [range(len(classes))], head(None, 3), order=order)


def test_every_label_meets_the_column_of_its_class() -> None:
    alignment = align(["cat", "dog"], [[0], [1]], head(["dog", "bird", "cat"]))
    assert {index: alignment.columns[place] for index, place in alignment.positions.items()} == {0: 2, 1: 0}


@pytest.mark.parametrize(
    ("classes", "model", "text"),
    [
        (["n01440764 tench", "zebra fish"], IMAGENET, "1 classes of the data are not among the head's: zebra fish"),
        (["crane"], IMAGENET, "1 classes of the data are not among the head's: crane"),  # two classes have that name
        (["n02012849 crane"], head(["n03126707"], descriptions={"n03126707": "crane"}), "head's: n02012849 crane"),
        (
            ["a"],
            head(None, 37),
            "the names of the head's 37 classes are unknown, and the data has 1 classes .a.: expected --class-names FILE",
        ),
        (["a"], head(["a", "b"], 3), "the names of the head's 3 classes are unknown"),
    ],
)
def test_what_cannot_be_aligned(classes: list[str], model: Classifier, text: str) -> None:
    with pytest.raises(NotApplicableError, match=text):
        align(classes, [range(len(classes))], model)


def test_numbers_are_indices_of_the_head() -> None:
    """The folders of ImageNet-V2 are called 0 to 999, and come in the order 0, 1, 10, 100, ..."""
    alignment = align(["7", "10", "999"], [[0], [1], [2]], IMAGENET)
    assert alignment.columns == (7, 10, 999)
    assert alignment.positions == {0: 0, 1: 1, 2: 2}
    assert align(["10", "9"], [[0], [1]], IMAGENET).positions == {0: 1, 1: 0}
    with pytest.raises(NotApplicableError, match="classes of the data are not among the head's: 1000"):
        align(["1000"], [[0]], IMAGENET)


def test_a_subset_of_imagenet_is_scored_as_timm_scores_it() -> None:
    """timm keeps the logits of ImageNet-A's 200 classes, by `imagenet_a_indices.txt`."""
    synsets = pkgutil.get_data("timm.data", "_info/imagenet_a_synsets.txt").decode().split()
    indices = pkgutil.get_data("timm.data", "_info/imagenet_a_indices.txt").decode().split()
    alignment = align(synsets, [range(200)], IMAGENET)
    assert alignment.columns == tuple(sorted(map(int, indices)))


def test_the_coco_class_map() -> None:
    class_map = load_class_map("coco80-to-imagenet1k")
    imagenet = set(ImageNetInfo().label_names())
    every = [synset for group in class_map.synsets.values() for synset in group]
    assert len(class_map.synsets) == 80
    assert len(every) == len(set(every)), "a synset stands for one class alone"
    assert set(every) <= imagenet
    assert class_map.synsets["zebra"] == ("n02391049",)
    assert not class_map.synsets["person"]
    alignment = align(list(class_map.synsets), [], IMAGENET, class_map)
    assert alignment.count == 62
    assert len(alignment.columns) == 1000
    assert alignment.left_out[:3] == ("person", "fire hydrant", "stop sign")
    assert alignment.groups is not None
    names = ImageNetInfo().label_names()
    dogs = alignment.groups[alignment.positions[list(class_map.synsets).index("dog")]]
    assert (len(dogs), names[dogs[0]], names[dogs[-1]]) == (118, "n02085620", "n02113978")
    assert class_map.fingerprint != load_class_map("coco80-to-imagenet1k", "log-probabilities").fingerprint


def test_several_synsets_become_one_score() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    groups = [[0, 2, 5], [3]]
    expected = torch.stack([logits[:, [0, 2, 5]].max(1).values, logits[:, 3]], dim=1)
    assert torch.equal(combined(logits, groups, "logits"), expected)
    p = logits.softmax(1)
    expected = torch.stack([p[:, 0] + p[:, 2] + p[:, 5], p[:, 3]], dim=1).log()
    torch.testing.assert_close(combined(logits, groups, "log-probabilities"), expected)


def test_class_maps_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--class-map: found 'gone'; expected one of coco80-to-imagenet1k, or a JSON"):
        load_class_map("gone")
    for text in ("[]", "{", '{"classes": {"cat": ["tabby"]}}', '{"classes": {"cat": 3}}'):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(ValueError, match="map.json: is not a class map: "):
            load_class_map(str(tmp_path / "map.json"))
    (tmp_path / "map.json").write_text('{"classes": {"cat": ["n02123045"], "wolf": []}}')
    class_map = load_class_map(str(tmp_path / "map.json"))
    with pytest.raises(NotApplicableError, match="the class map map does not have the data's dog"):
        align(["cat", "dog"], [], IMAGENET, class_map)
    with pytest.raises(NotApplicableError, match="3 classes are unknown, and the class map map needs them: expected"):
        align(["cat", "wolf"], [], head(None, 3), class_map, order="folders")
    with pytest.raises(NotApplicableError, match="no class of the class map map is among the head's"):
        align(["cat", "wolf"], [], head(["a", "b"]), class_map)
