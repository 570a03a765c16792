"""What a visitor of the demo cannot load: repositories that ask for more memory than the page allows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm

pytest.importorskip("gradio", reason="the extra `demo` is not installed: nothing here says whether the page works")

from timm_csra.demo import checkpoints
from timm_csra.demo.told import Refused

from .hub import Hub

NAME = "hf-hub:somebody/model"
SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    checkpoints._load.cache_clear()
    yield
    checkpoints._load.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "saved"), safe_serialization=True)
    return tmp_path / "saved"


def write(folder: Path, **changed: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": {}, **changed}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"num_classes": 10**9},
            r" has 97,\d{3} million parameters; visitors can load models of up to 700 million\.",
        ),
        (  # (300 * 300)^2 indices of pairs of locations, which are no parameter
            {"architecture": SWIN, "model_args": {"window_size": 300, "img_size": 1200}},
            r" has 17,\d{3} million parameters; visitors",
        ),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"device": "cpu", "embed_dim": 192}},
            r" could not be loaded: config\.json has model_args \{'device': 'cpu', .*; expected arguments of the arch",
        ),
        (
            {"model_args": {"nonsense": 1}},
            r" could not be loaded: TypeError: .*unexpected keyword argument 'nonsense'$",
        ),
        ({"model_args": {"block": "x"}}, r" could not be loaded: AttributeError: 'str' object has no attribute"),
        (
            {"architecture": ["a"]},
            r" could not be loaded: config\.json has no architecture; expected the name of a timm",
        ),
    ],
)
def test_a_repository_that_asks_for_too_much(hub: Hub, folder: Path, config: dict[str, Any], said: str) -> None:
    write(folder, **config)
    hub.add("somebody/model", folder)
    with pytest.raises(Refused, match=f"^{NAME}{said}"):
        checkpoints.checkpoint(NAME, {})
    assert not any("model.safetensors" in request for request in hub.requests)


@pytest.mark.parametrize("override", [None, "other.bin"])
def test_a_small_model_with_a_large_file(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, override: str | None
) -> None:
    """A file is read as a whole, whatever the model takes of it."""
    monkeypatch.setattr(checkpoints, "MOST_BYTES", 1e5)
    file = "model.safetensors"
    if override:
        write(folder, pretrained_cfg={"hf_hub_filename": override})
        file = "other.safetensors"
        (folder / "model.safetensors").rename(folder / file)
    hub.add("somebody/model", folder)
    with pytest.raises(Refused, match=rf"^{NAME}: {file} has 0\.0 GB; visitors can load files of up to 0 GB\. Whoever"):
        checkpoints.checkpoint(NAME, {})
    assert not any(f"resolve/main/{file}" in request for request in hub.requests)


def test_what_is_in_the_cache_is_not_asked_for_again(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("somebody/model", folder)
    checkpoints.checkpoint(NAME, {})
    checkpoints._load.cache_clear()
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert checkpoints.checkpoint(NAME, {}).explanation.num_classes == 1000
    assert hub.requests == []


def test_a_repository_that_grows_after_it_was_checked(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("somebody/model", folder)
    small = hub.repos["somebody/model"].commits[0]
    write(folder, num_classes=10**9)
    large = small | {"config.json": (folder / "config.json").read_bytes()}
    checked = checkpoints._checked

    def grow(name: str) -> str:
        source = checked(name)
        hub.repos["somebody/model"].commits.append(large)
        hub.repos["somebody/model"].branches["main"] = 1
        return source

    monkeypatch.setattr(checkpoints, "_checked", grow)
    assert checkpoints.checkpoint(NAME, {}).explanation.num_classes == 1000  # the commit that was checked
    monkeypatch.setattr(checkpoints, "_checked", checked)
    checkpoints._load.cache_clear()  # as after two other checkpoints
    with pytest.raises(Refused, match="million parameters"):
        checkpoints.checkpoint(NAME, {})
