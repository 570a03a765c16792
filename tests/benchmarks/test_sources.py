"""Archives, COCO, Pascal VOC and timm's own datasets, each made here in its published form."""

import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import webdataset
from PIL import Image

from benchmarks.data.annotations import VOC
from benchmarks.data.datasets import DataError, NotApplicableError, real_labels
from benchmarks.data.sources import load_image_set
from benchmarks.sweep import main


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(5):
        picture(tmp_path / "photos" / ("n01440764", "n02123045")[index % 2] / f"{index}.png", index)
    return tmp_path / "photos"


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_an_archive_is_its_folder(folder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photos{suffix}"
    files = sorted(folder.rglob("*.png"))
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(folder.parent))
    data, expected = load_image_set(path), load_image_set(folder)
    assert (data.name, data.classes, data.labels) == ("photos", expected.classes, expected.labels)
    data = pickle.loads(pickle.dumps(data))  # it goes to another process
    for index in range(len(expected)):
        assert data.paths[index].name == expected.paths[index].name
        assert np.array_equal(np.asarray(data.open(index)), np.asarray(expected.open(index)))
    few, of = (
        load_image_set(path, limit=2),
        {path.name: labels for path, labels in zip(expected.paths, expected.labels, strict=True)},
    )
    assert few.labels == tuple(of[name.name] for name in few.paths)
    assert np.array_equal(np.asarray(few.open(1)), np.asarray(Image.open(next(folder.rglob(few.paths[1].name)))))
    assert data.fingerprint == load_image_set(path).fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", path.name]  # no index is written beside it


def test_refused_archives(tmp_path: Path) -> None:
    for name in ("a.zip", "a.tar"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(DataError, match=f"{name}: cannot be read as a "):
            load_image_set(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "no image")
    with pytest.raises(DataError, match="found no image; expected one folder per class"):
        load_image_set(tmp_path / "empty.zip")


def coco(tmp_path: Path, **changes: object) -> Path:
    notes = {
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in (9, 2, 5)],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 18, "iscrowd": 1},
            {"id": 3, "image_id": 9, "category_id": 3, "iscrowd": 0},
            {"id": 4, "image_id": 2, "category_id": 3, "iscrowd": 1},
        ],
        **changes,
    }
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notes))
    return path


def test_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = coco(tmp_path)
    for index in (2, 5, 9):
        picture(tmp_path / "coco" / "val2017" / f"{index:012}.jpg", index)
    data = load_image_set(path)
    assert (data.name, data.classes, data.multilabel) == ("instances_val2017", ("car", "dog"), True)
    assert [p.name for p in data.paths] == ["000000000002.jpg", "000000000005.jpg", "000000000009.jpg"]
    assert data.labels == ((0,), (), (0, 1))
    assert capsys.readouterr().out == ""
    assert data.open(0).size == (30, 20)
    (tmp_path / "coco" / "val2017" / "000000000005.jpg").unlink()
    with pytest.raises(DataError, match="1 of its 3 images are missing, the first one .*000000000005.jpg"):
        load_image_set(path)


def test_refused_coco(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its image 000000000002.jpg is in none of .*val2017"):
        load_image_set(coco(tmp_path))
    with pytest.raises(DataError, match="found 0 images and 2 categories; expected COCO instances"):
        load_image_set(coco(tmp_path, images=[], annotations=[]))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="list.json: cannot be read as COCO instances"):
        load_image_set(tmp_path / "list.json")


def voc(root: Path, objects: dict[str, list[tuple[str, int]]], split: str = "test") -> Path:
    for index, (name, found) in enumerate(objects.items()):
        picture(root / "JPEGImages" / f"{name}.jpg", index)
        xml = "".join(f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in found)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{xml}</annotation>")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(objects))
    return root


def test_voc_knows_difficult_objects(tmp_path: Path) -> None:
    root = voc(
        tmp_path / "VOC2007",
        {
            "000001": [("dog", 0), ("person", 1), ("person", 0)],
            "000002": [("car", 1)],
            "000003": [("tvmonitor", 0)],
        },
    )
    data = load_image_set(root)
    dog, person, car, screen = (VOC.index(name) for name in ("dog", "person", "car", "tvmonitor"))
    assert (data.name, data.classes, data.multilabel) == ("VOC2007-test", VOC, True)
    assert data.labels == ((dog, person), (), (screen,))
    assert data.ignored == ((), (car,), ())  # nothing says that there is no car
    few, of = load_image_set(root, limit=2), {"000001": (), "000002": (car,), "000003": ()}
    assert few.ignored == tuple(of[path.stem] for path in few.paths)
    assert load_image_set(root, limit=2).fingerprint != data.fingerprint
    with pytest.raises(DataError, match="trainval.txt: no such file; expected one of test"):
        load_image_set(root, split="trainval")
    (root / "Annotations" / "000003.xml").write_text("<annotation><object><name>wolf</name></object></annotation>")
    with pytest.raises(DataError, match="000003.xml: cannot be read as a VOC annotation: "):
        load_image_set(root)


def test_torchvision_datasets_by_timm(tmp_path: Path) -> None:
    """CIFAR-10 in its published form, of twenty random pictures."""
    import hashlib

    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)
    pixels, targets = rng.integers(0, 256, (20, 3072), dtype=np.uint8), rng.integers(0, 10, 20).tolist()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    blobs = {"test_batch": {"data": pixels, "labels": targets}, "batches.meta": {"label_names": names}}
    sums = {}
    for name, blob in blobs.items():
        (base / name).write_bytes(pickle.dumps(blob))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        patch.setattr(CIFAR10, "train_list", [])
        patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
        data = load_image_set("torch/cifar10", data_dir=str(tmp_path))
    assert (data.name, len(data), data.classes) == ("torch/cifar10", 20, tuple(names))
    assert data.labels == tuple((target,) for target in targets)
    expected = pixels[3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(data.open(3)), expected)
    with pytest.raises(DataError, match="torch/cifar10: timm.data.create_dataset with split='validation' and root="):
        load_image_set("torch/cifar10", data_dir=str(tmp_path / "nowhere"))


def test_hub_datasets_by_timm(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for index, path in enumerate(sorted(folder.rglob("*.png"))):
        target = root / "validation" / path.parent.name / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    data = load_image_set(f"hfds/{root}", data_dir=str(tmp_path / "cache"))
    assert (len(data), data.classes) == (5, ("n01440764", "n02123045"))
    assert sorted(data.labels) == [(0,), (0,), (0,), (1,), (1,)]
    shown = {np.asarray(data.open(index)).tobytes() for index in range(5)}
    assert shown == {np.asarray(Image.open(path)).tobytes() for path in folder.rglob("*.png")}


def shards(root: Path, folder: Path, classes: list[str], broken: int | None = None) -> Path:
    """A web dataset of two tar files, as its library writes them."""
    root.mkdir()
    files = sorted(folder.rglob("*.png"))
    for shard in range(2):
        with webdataset.TarWriter(str(root / f"val-{shard:04}.tar")) as writer:
            for index in range(shard, len(files), 2):
                content = b"no image" if index == broken else files[index].read_bytes()
                label = classes.index(files[index].parent.name)
                writer.write({"__key__": f"{index:04}", "png": content, "cls": str(label).encode()})
    splits = {"validation": {"name": "validation", "filenames": ["val-0000.tar", "val-0001.tar"]}}
    splits["validation"] |= {"shard_lengths": [(len(files) + 1) // 2, len(files) // 2], "num_samples": len(files)}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def test_a_stream_is_scored_as_its_folder(tmp_path: Path, folder: Path) -> None:
    torch.manual_seed(0)
    names = [f"class {index}" for index in range(8)] + ["n02123045", "n01440764"]
    model = timm.create_model("test_resnet", num_classes=10)
    timm.models.save_for_hf(
        model, str(tmp_path / "model"), model_config={"label_names": names}, safe_serialization=True
    )

    def sweep(out: str, *arguments: str) -> dict:
        main(
            [
                "--models",
                f"local-dir:{tmp_path / 'model'}",
                "--out",
                str(tmp_path / out),
                "--device",
                "cpu",
                "--img-size",
                "64",
            ]
            + ["--batch-size", "2", *arguments]
        )
        (path,) = (tmp_path / out / "records").glob("*.json")
        return json.loads(path.read_text())

    root = shards(tmp_path / "shards", folder, names)
    stream = sweep("stream", "--data", "wds/x", "--data-dir", str(root), "--workers", "0")
    assert (stream["status"], stream["n"], stream["columns"]) == ("ok", 5, 10), stream["reason"]
    files = sweep("files", "--data", str(folder), "--workers", "0")
    assert (files["n"], files["columns"]) == (5, 2)
    model.eval()
    config = timm.data.resolve_data_config(model=model) | {"input_size": (3, 64, 64)}
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        hits = [
            names[model(transform(Image.open(path).convert("RGB"))[None]).argmax()] == path.parent.name
            for path in folder.rglob("*.png")
        ]
    plain = next(r for r in stream["results"] if (r["metric"], r["protocol"]) == ("top1", "fixed"))
    assert plain["baseline"] == pytest.approx(100 * np.mean(hits))
    mosaic = sweep("mosaic", "--data", "wds/x", "--data-dir", str(root), "--workers", "0", "--task", "mosaic")
    assert mosaic["status"] == "not_applicable"
    assert "scored by the task single alone" in mosaic["reason"]

    broken = shards(tmp_path / "broken", folder, names, broken=3)
    record = sweep("fails", "--data", "wds/x", "--data-dir", str(broken), "--workers", "0")
    assert record["status"] == "failed"
    assert "found 4 images, expected 5: timm's reader skips images that it cannot read" in record["reason"]
    arguments = ("--workers", "2", "--skip-bad-images")
    record = sweep("skips", "--data", "wds/x", "--data-dir", str(broken), *arguments)
    assert (record["status"], record["n"], record["missing_images"]) == ("ok", 4, 1), record["reason"]


def test_what_is_nothing_of_these(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tfds/x: timm.data.create_dataset with split='validation' and root="):
        load_image_set("tfds/x")
    with pytest.raises(DataError, match="no such folder, archive or annotations; expected an ImageFolder"):
        load_image_set(tmp_path / "gone.zip")


def test_real_labels_by_file_name(tmp_path: Path, real_data: Path) -> None:
    import csv

    root = real_data / "imagenette500"
    data = real_labels(load_image_set(root))
    with (root / "labels.csv").open(newline="") as file:
        expected = [tuple(map(int, row["real_labels"].split())) for row in csv.DictReader(file)]
    assert [tuple(sorted(found)) for found in data.labels] == [tuple(sorted(found)) for found in expected]
    assert sum(not found for found in data.labels) == 25
    assert (data.multilabel, len(data.classes), data.classes[0]) == (True, 1000, "n01440764")
    picture(tmp_path / "cat" / "mine.png", 0)
    with pytest.raises(NotApplicableError, match="no ReaL label for mine.png: expected names such as ILSVRC2012_val_"):
        real_labels(load_image_set(tmp_path))


@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_a_dataset_of_the_hub_is_scored_as_its_pictures(tmp_path: Path, prefix: str) -> None:
    names = ["n02123045", "n01440764"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)) for _ in range(6)]
    labels = [0, 1, 0, 1, 1, 1]
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    rows.to_parquet(str(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet"))
    # Its card, from which timm's reader of streams learns how long it is.
    card = {"dataset_info": {"splits": [{"name": "validation", "num_bytes": 1, "num_examples": 6}]}}
    (tmp_path / "set" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(
        model, str(tmp_path / "model"), model_config={"label_names": names}, safe_serialization=True
    )

    arguments = ["--models", f"local-dir:{tmp_path / 'model'}", "--data", f"{prefix}/{tmp_path / 'set'}"]
    arguments += ["--data-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--img-size", "64", "--batch-size", "4", "--workers", "0"]) == 0
    (path,) = (tmp_path / "out" / "records").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["n"], record["columns"]) == ("ok", 6, 2)
    model.eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model) | {"input_size": (3, 64, 64)})
    with torch.no_grad():
        hits = [model(transform(x)[None]).argmax().item() == y for x, y in zip(pictures, labels, strict=True)]
    fixed = next(r for r in record["results"] if (r["metric"], r["protocol"]) == ("top1", "fixed"))
    assert fixed["baseline"] == pytest.approx(100 * np.mean(hits))


def test_a_dataset_of_the_hub_with_several_labels(tmp_path: Path) -> None:
    names = ["cat", "dog", "bird"]
    several = datasets.Sequence(datasets.ClassLabel(names=names))
    features = datasets.Features({"image": datasets.Image(), "label": several})
    pictures = [Image.new("RGB", (20, 30), (40 * index, 0, 0)) for index in range(4)]
    labels = [[0, 1], [2], [], [1, 2]]
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    rows.to_parquet(str(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet"))
    data = load_image_set(f"hfds/{tmp_path / 'set'}", data_dir=str(tmp_path / "cache"))
    assert data.multilabel
    assert data.labels == ((0, 1), (2,), (), (1, 2))
    assert len(data.classes) == 3
