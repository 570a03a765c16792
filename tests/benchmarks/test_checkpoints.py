"""What --models takes, and where the weights come from."""

from pathlib import Path

import pytest
import timm
import torch

from benchmarks.checkpoints.find import PYPI, Checkpoint, CheckpointError, find_checkpoints
from timm_csra.hub import weights_sha256


def test_specs(tmp_path: Path) -> None:
    folder = tmp_path / "my"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = tmp_path / "models.txt"
    names.write_text(f"# mine\nresnet18.a1_in1k  # a tag\n\nlocal-dir:{folder}\n")
    assert find_checkpoints("resnet18.a1_in1k") == [Checkpoint("timm", "resnet18.a1_in1k")]
    assert find_checkpoints("resnet18") == [Checkpoint("timm", f"resnet18.{timm.get_pretrained_cfg('resnet18').tag}")]
    assert [c.id for c in find_checkpoints("test_vit*")] == timm.list_models("test_vit*", pretrained=True)
    assert len(find_checkpoints("all")) == len(timm.list_models(pretrained=True))
    assert [c.name for c in find_checkpoints("pypi:*")] == [f"pypi:{name}" for name in PYPI]
    assert [c.name for c in find_checkpoints(f"{names},hf-hub:user/repo,resnet18.a1_in1k")] == [
        "resnet18.a1_in1k",
        f"local-dir:{folder}",
        "hf-hub:user/repo",
    ]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("resnet5o", "resnet5o: matches no pretrained timm model. Did you mean resnet50"),
        ("pypi:resnet50", "pypi:resnet50: found no such wheel; expected one of tf_efficientnet_lite0"),
        (
            "local-dir:/nowhere",
            "local-dir:/nowhere: /nowhere/config.json not found; expected a folder in timm's format",
        ),
        ("gone.txt", "gone.txt: no such file; expected a text file with one model a line"),
        (" , ", "no checkpoint named in ' , '"),
    ],
)
def test_refused_specs(spec: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        find_checkpoints(spec)


def test_wheel_weights_are_loaded_by_timm_strictly() -> None:
    (checkpoint,) = find_checkpoints("pypi:tf_efficientnet_lite0")
    model = checkpoint.create((224, 224))
    assert checkpoint.input_size() == (224, 224)
    assert checkpoint.is_cached()
    assert not model.training
    assert model.bn1.running_mean.abs().sum() > 0  # statistics of training, not the initial zeros
    assert weights_sha256(model) == weights_sha256(checkpoint.create((320, 320)))
    with torch.no_grad():
        model.classifier.bias[0] += 1
    assert weights_sha256(model) != weights_sha256(checkpoint.create((224, 224)))


def test_local_fixed_size_models_are_built_for_the_size(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=4)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    (checkpoint,) = find_checkpoints(f"local-dir:{tmp_path}/")
    assert checkpoint.name == f"local-dir:{tmp_path}"
    assert checkpoint.input_size() == (160, 160)
    assert checkpoint.create((320, 320))(torch.zeros(1, 3, 320, 320)).shape == (1, 4)
    fingerprint = checkpoint.fingerprint
    with torch.no_grad():
        model.head.bias[0] += 1
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert find_checkpoints(f"local-dir:{tmp_path}")[0].fingerprint != fingerprint
