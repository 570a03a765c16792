"""Files of timm's train script: written by timm's own saver, and read without running anything in them."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.utils import CheckpointSaver, ModelEmaV3

import timm_csra
from timm_csra.trained import class_names, read_trained

TINY = [name for name in timm.list_models("test_*", pretrained=True) if "clip" not in name]


def train(folder: Path, name: str, classes: int, ema: bool = False, **args: Any) -> tuple[Path, torch.nn.Module, Any]:
    """One step, and what timm's train script leaves of it."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = timm.create_model(name, num_classes=classes, **(args.get("model_kwargs") or {}))
    average = ModelEmaV3(model, decay=0.5) if ema else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    size = timm.data.resolve_data_config(args, model=model)["input_size"]
    model(torch.randn(2, *size)).square().sum().backward()
    optimizer.step()
    if average is not None:
        average.update(model)
    saver = CheckpointSaver(
        model,
        optimizer,
        argparse.Namespace(model=name, num_classes=classes, **args),
        average,
        checkpoint_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=71.5)
    return folder / "model_best.pth.tar", model.eval(), average and average.module.eval()


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_of_the_train_script_is_the_trained_model(tmp_path: Path, name: str) -> None:
    file, model, _ = train(tmp_path, name, 7)
    trained = read_trained(f"{name.partition('.')[0]}@{file}")
    assert (trained.num_classes, trained.weights, trained.name) == (7, "state_dict", name)
    loaded = trained.create()
    assert not loaded.training
    assert loaded.num_classes == 7
    x = torch.randn(2, *loaded.pretrained_cfg["input_size"])
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_the_moving_average_is_taken_and_said(tmp_path: Path) -> None:
    file, model, average = train(tmp_path, "test_resnet", 3, ema=True)
    trained = read_trained(f"test_resnet@{file}")
    assert trained.weights_from == "state_dict_ema of model_best.pth.tar, an exponential moving average"
    loaded = trained.create()
    assert torch.equal(loaded.fc.weight, average.fc.weight)
    assert not torch.equal(loaded.fc.weight, model.fc.weight)


def test_preprocessing_is_that_of_the_training(tmp_path: Path) -> None:
    args = {"img_size": 96, "mean": [0.5, 0.4, 0.3], "std": None, "interpolation": "bilinear", "crop_pct": 1.0}
    file, _, _ = train(tmp_path, "test_vit", 3, **args, model_kwargs={"img_size": 96})
    model = read_trained(f"test_vit@{file}").create()
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.resolve_data_config(args, model=timm.create_model("test_vit"))  # as the train script does
    assert config == expected
    assert config["input_size"] == (3, 96, 96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    assert "test_input_size" not in model.pretrained_cfg, "that is of the published weights"


def test_what_shaped_the_model_comes_back(tmp_path: Path) -> None:
    file, model, _ = train(tmp_path, "test_convnext", 3, gp="max", model_kwargs={"global_pool": "max", "use_grn": True})
    loaded = read_trained(f"test_convnext@{file}").create()
    x = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_weights_alone(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=5).eval()
    state = model.state_dict()
    torch.save({f"module._orig_mod.{key}": tensor for key, tensor in state.items()}, tmp_path / "weights.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "weights.safetensors")
    for file in sorted(tmp_path.iterdir()):
        trained = read_trained(f"test_resnet.r160_in1k@{file}")
        assert trained.weights_from == file.name
        loaded = trained.create()
        assert torch.equal(loaded.fc.weight, model.fc.weight)
        assert loaded.pretrained_cfg["crop_pct"] == timm.get_pretrained_cfg("test_resnet.r160_in1k").crop_pct


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    torch.save({"state_dict": state, "args": Payload(tmp_path / "ran")}, tmp_path / "a.pth.tar")
    (tmp_path / "b.pth.tar").write_bytes(pickle.dumps({"state_dict": Payload(tmp_path / "ran")}, protocol=2))
    for name in ("a", "b"):
        text = f"{name}.pth.tar: cannot be read with weights_only=True: .*is refused. If you trust the file, load it"
        with pytest.raises(ValueError, match=text):
            read_trained(f"test_resnet@{tmp_path / name}.pth.tar")
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    file, _, _ = train(tmp_path, "test_resnet.r160_in1k", 3)
    weights, other = tmp_path / "weights.pth", tmp_path / "other.pth"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), weights)
    torch.save({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}, other)
    for spec, text in (
        ("test_resnet", "file:test_resnet: found 'test_resnet', expected ARCH@PATH, such as resnet50@output/train/"),
        (f"resnet5o@{file}", "found 'resnet5o', expected ARCH@PATH"),
        (f"test_resnet.of_tomorrow@{file}", "found 'test_resnet.of_tomorrow', expected ARCH@PATH"),
        ("test_resnet@gone.pth.tar", "gone.pth.tar not found; expected a checkpoint of timm's train script"),
        (
            f"test_vit@{file}",
            "model_best.pth.tar: holds a test_resnet.r160_in1k, but test_vit was given; use test_resnet",
        ),
        (f"test_vit@{weights}", "weights.pth: found .* weights, the first conv1.* expected head.weight among them"),
    ):
        with pytest.raises(ValueError, match=text):
            read_trained(spec)
    with pytest.raises(ValueError, match="other.pth: the weights do not fit test_resnet with 3 classes: .*Missing key"):
        read_trained(f"test_resnet@{other}").create()
    torch.save([1, 2], other)
    with pytest.raises(ValueError, match="other.pth: found a list, expected a state dict or a training checkpoint"):
        read_trained(f"test_resnet@{other}")
    torch.save({"epoch": 3}, other)
    with pytest.raises(ValueError, match="other.pth: found no weights; expected one of state_dict_ema, "):
        read_trained(f"test_resnet@{other}")


def test_it_can_be_wrapped_and_saved(tmp_path: Path) -> None:
    """The published weights' licence and origin are not claimed for others."""
    file, model, _ = train(tmp_path / "run", "test_resnet.r160_in1k", 3)
    wrapped = timm_csra.wrap(read_trained(f"test_resnet@{file}").create(), lam=0.2)
    timm_csra.save_pretrained(wrapped, tmp_path / "saved")
    loaded = timm_csra.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "The licence is unknown" in card
    assert "The base checkpoint is unknown" in card


def test_from_pretrained_takes_a_file_of_the_train_script(tmp_path: Path) -> None:
    file, model, _ = train(tmp_path / "run", "test_resnet", 3, img_size=96)
    names = {"label_names": ["cat", "dog", "horse"]}
    wrapped = timm_csra.from_pretrained(
        f"file:test_resnet@{file}", lam=0.2, scores="log_softmax", pretrained_cfg_overlay=names
    )
    assert wrapped.csra == timm_csra.CSRAConfig(0.2, scores="log_softmax") and not wrapped.training
    assert (
        wrapped.pretrained_cfg["input_size"] == (3, 96, 96)
        and wrapped.pretrained_cfg["label_names"] == names["label_names"]
    )
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(timm_csra.unwrap(wrapped)(x), model(x))
    timm_csra.save_pretrained(timm_csra.wrap(wrapped), tmp_path / "saved")
    assert timm_csra.from_pretrained(tmp_path / "saved").pretrained_cfg["label_names"] == names["label_names"]
    assert timm_csra.from_pretrained(f"file:test_resnet@{file}").csra == timm_csra.CSRAConfig()
    with pytest.raises(
        ValueError, match="file:test_resnet@.*: found revision='main' with a file; only a repository has"
    ):
        timm_csra.from_pretrained(f"file:test_resnet@{file}", revision="main")
    with pytest.raises(ValueError, match="file:test_resnet@gone.pth: gone.pth not found"):
        timm_csra.from_pretrained("file:test_resnet@gone.pth")
    with pytest.raises(TypeError, match="found the argument checkpoint_path"):
        timm_csra.from_pretrained(f"file:test_resnet@{file}", checkpoint_path="x")


def test_names_of_classes(tmp_path: Path) -> None:
    def named(classes: int, **config: Any) -> tuple[str, ...]:
        return class_names(timm.create_model("test_resnet", num_classes=classes, pretrained_cfg_overlay=config))

    descriptions = {"n1": "cat, house cat", "n2": "dog"}
    assert named(3) == ("0", "1", "2")
    assert named(2, label_names=["n1", "n2"]) == ("n1", "n2")
    assert named(2, label_names=["n1", "n2"], label_descriptions=descriptions) == ("cat, house cat", "dog")
    imagenet = ImageNetInfo("imagenet-1k")
    assert named(1000)[281] == named(1000, label_names=imagenet.label_names())[281] == "tabby, tabby cat"
    own = [f"class {index}" for index in range(1000)]
    assert named(1000, label_names=own) == tuple(own)
    with pytest.raises(ValueError, match="test_resnet: found 2 names of classes, expected 3"):
        named(3, label_names=["n1", "n2"])
    model = timm_csra.wrap(
        timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay={"label_names": ["n1", "n2"]}).eval()
    )
    model.pretrained_cfg["label_descriptions"] = descriptions
    timm_csra.save_pretrained(model, tmp_path)
    assert class_names(timm_csra.from_pretrained(tmp_path)) == ("cat, house cat", "dog")
