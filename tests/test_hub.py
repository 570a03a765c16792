"""Save, push and load: the real client of timm, huggingface_hub and transformers against a small Hub on loopback."""

import json
import logging
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.utils.prune
import transformers
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn

import timm_csra
from timm_csra.hub import weights_sha256

from .hub import READER, WRITER, Hub

HAS_MODEL_ARGS = hasattr(timm.models, "resolve_model_input_args")  # timm 1.0.31 records how a model was made
TORCHAO_LOADS = hasattr(nn.functional, "ScalingType")  # torchao 0.18 wants it, and transformers imports torchao
IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def make(
    name: str = "test_resnet",
    lam: float = 0.3,
    temperature: object = (1.0, math.inf),
    scores: str = "logits",
    **kwargs: object,
) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no head of zeros, or equal logits would prove nothing
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return timm_csra.wrap(model, lam, temperature, scores)  # type: ignore[arg-type]


@torch.inference_mode()
def logits(model: nn.Module, x: torch.Tensor = IMAGES) -> torch.Tensor:
    return model.eval()(x)


def plain_logits(model: nn.Module, x: torch.Tensor = IMAGES) -> torch.Tensor:
    lam, model.csra.lam = model.csra.lam, 0.0
    try:
        return logits(model, x)
    finally:
        model.csra.lam = lam


def plain_timm(folder: Path) -> nn.Module:
    """Read by timm alone; where it cannot read safetensors from a folder the test is skipped and says so."""
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    except pickle.UnpicklingError:
        versions = f"timm {timm.__version__} with torch {torch.__version__}"
        pytest.skip(f"{versions} cannot read safetensors from a folder: loading by plain timm did NOT run")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


# Folders


MODELS = {
    "resnet": ("test_resnet", {}),
    "vit, 7 classes": ("test_vit", {"num_classes": 7, "img_size": 96}),
    "one channel": ("test_efficientnet", {"in_chans": 1}),
    "other pooling": ("test_vit", {"global_pool": "avg", "num_classes": 5, "img_size": 96}),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back_as_it_was(case: str, tmp_path: Path) -> None:
    name, arguments = MODELS[case]
    if arguments and not HAS_MODEL_ARGS:
        pytest.skip(f"timm {timm.__version__} does not record how a model was made")
    x = IMAGES[:, : arguments.get("in_chans", 3)]
    model = make(name, **arguments)
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": 0.77, "mean": (0.1, 0.2, 0.3)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    timm_csra.save_pretrained(model, tmp_path / "saved")
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    loaded = timm_csra.from_pretrained(tmp_path / "saved")
    assert timm_csra.is_wrapped(loaded) and not loaded.training
    assert loaded.csra == model.csra
    assert torch.equal(logits(loaded, x), logits(model, x))
    assert loaded.num_classes == model.num_classes
    mean = (0.1, 0.2, 0.3) if x.shape[1] == 3 else (pytest.approx(0.2),)
    assert (loaded.pretrained_cfg["crop_pct"], tuple(loaded.pretrained_cfg["mean"])) == (0.77, mean)

    timm_csra.save_pretrained(loaded, tmp_path / "again")  # the round trip is stable
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()

    plain = plain_timm(tmp_path / "saved")
    assert not timm_csra.is_wrapped(plain)
    assert torch.equal(logits(plain, x), plain_logits(model, x))


def test_labels_survive(tmp_path: Path) -> None:
    overlay = {"label_names": ["cat", "dog"], "label_descriptions": {"cat": "a cat", "dog": "a dog"}}
    model = make(num_classes=2, pretrained_cfg_overlay=overlay)
    timm_csra.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["label_names"], config["num_classes"]) == (["cat", "dog"], 2)
    assert config["csra"] == {"version": 2, "lam": 0.3, "temperature": [1.0, "inf"], "scores": "logits"}
    assert "num_classes" not in config.get("model_args", {})
    loaded = timm_csra.from_pretrained(tmp_path)
    assert loaded.pretrained_cfg["label_names"] == ["cat", "dog"]
    assert loaded.pretrained_cfg["label_descriptions"] == overlay["label_descriptions"]


def test_a_model_changed_by_its_user_comes_back(tmp_path: Path) -> None:
    model = make()
    model.reset_classifier(4)
    model.to(memory_format=torch.channels_last)
    timm_csra.save_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(timm_csra.from_pretrained(f"local-dir:{tmp_path}")), logits(model))
    assert not model._state_dict_hooks


def replaced(model: nn.Module) -> None:
    model.fc = nn.Linear(model.num_features, 20)


def replaced_head(model: nn.Module) -> None:
    model.head = nn.Linear(model.num_features, 20)


def too_many(model: nn.Module) -> None:
    model.num_classes = 20


def mlp(model: nn.Module) -> None:
    model.fc = nn.Sequential(nn.Linear(model.num_features, 32), nn.ReLU(), nn.Linear(32, 1000))


def no_bias(model: nn.Module) -> None:
    model.fc = nn.Linear(model.num_features, 1000, bias=False)


def another_buffer(model: nn.Module) -> None:
    model.register_buffer("prior", torch.zeros(1000))


def weight_norm(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.fc)


def old_weight_norm(model: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.fc)


def pruned(model: nn.Module) -> None:
    torch.nn.utils.prune.l1_unstructured(model.fc, "weight", 0.5)


def compiled_layer(model: nn.Module) -> None:
    model.fc = torch.compile(model.fc)


def reparameterised(model: nn.Module) -> None:
    timm.utils.reparameterize_model(model, inplace=True)


def no_classifier(model: nn.Module) -> None:
    model.reset_classifier(0)


CLASSES_20 = "set model.num_classes = 20, or make the classifier with model.reset_classifier(20)."
OWN_LAYERS = "timm's format cannot hold layers of your own: make the classifier with model.reset_classifier(1000), put back the layers that timm builds"
UNLOADABLE = [
    (replaced, "test_resnet", "of another shape: fc.bias (found (20,), expected (1000,)), fc.weight (found (20, 96), expected (1000, 96)). The classifier has 20 classes, but model.num_classes is 1000: " + CLASSES_20),
    (replaced_head, "test_vit", "of another shape: head.bias (found (20,), expected (1000,)), head.weight (found (20, 64), expected (1000, 64)). The classifier has 20 classes, but model.num_classes is 1000: " + CLASSES_20),
    (too_many, "test_resnet", "The classifier has 1000 classes, but model.num_classes is 20: set model.num_classes = 1000, or"),
    (mlp, "test_resnet", "missing: fc.bias, fc.weight; unexpected: fc.0.bias, fc.0.weight, fc.2.bias, fc.2.weight. " + OWN_LAYERS),
    (no_bias, "test_resnet", "missing: fc.bias. " + OWN_LAYERS),
    (another_buffer, "test_resnet", "unexpected: prior. " + OWN_LAYERS),
    (weight_norm, "test_resnet", "missing: fc.weight; unexpected: fc.parametrizations.weight.original0, fc.parametrizations.weight.original1. Some layers are parametrized: undo that with torch.nn.utils.parametrize.remove_parametrizations("),
    (old_weight_norm, "test_resnet", "A layer has torch.nn.utils.weight_norm: undo that with torch.nn.utils.remove_weight_norm("),
    (pruned, "test_resnet", "A layer has torch.nn.utils.spectral_norm or prune: undo that with "),
    (compiled_layer, "test_resnet", "One of its layers is compiled: save the model first, then compile."),
    (reparameterised, "repghostnet_050", " more. The model is reparameterised: save it as it was before timm.utils.reparameterize_model, and"),
    (reparameterised, "levit_128s", " more. The model is reparameterised: save it as it was before"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name", "text"), UNLOADABLE, ids=[f"{c.__name__}-{n}" for c, n, _ in UNLOADABLE])
def test_what_could_not_be_loaded_is_not_saved(
    change: Callable, name: str, text: str, hub: Hub, tmp_path: Path
) -> None:
    timm_csra.save_pretrained(make(name), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = make(name)
    change(model)
    expected = (
        re.escape(f"{name}: cannot be saved, because from_pretrained could not load it: ") + ".*" + re.escape(text)
    )
    with pytest.raises(ValueError, match=expected) as caught:
        timm_csra.save_pretrained(model, tmp_path)
    assert len(str(caught.value)) < 1000
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match=expected):
        timm_csra.push_to_hub(model, "user/model", token=WRITER)
    assert not hub.repos


def test_a_model_without_a_classifier_is_not_saved(tmp_path: Path) -> None:
    model = make()
    no_classifier(model)
    with pytest.raises(timm_csra.UnsupportedModelError, match="test_resnet: found num_classes=0, no classifier"):
        timm_csra.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def undone(model: nn.Module) -> None:
    weight_norm(model)
    torch.nn.utils.parametrize.remove_parametrizations(model.fc, "weight")


def replaced_and_told(model: nn.Module) -> None:
    replaced(model)
    model.num_classes = 20


def replaced_by_another_of_its_size(model: nn.Module) -> None:
    model.fc = nn.Linear(model.num_features, 1000)


@pytest.mark.parametrize("change", [undone, replaced_and_told, replaced_by_another_of_its_size])
def test_a_changed_classifier_that_timm_can_build_comes_back(change: Callable, tmp_path: Path) -> None:
    model = make()
    change(model)
    timm_csra.save_pretrained(model, tmp_path)
    loaded = timm_csra.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.num_classes == model.num_classes == logits(model).shape[1]


def test_other_settings_and_arguments_at_loading(tmp_path: Path) -> None:
    model = make()
    timm_csra.save_pretrained(model, tmp_path)
    assert timm_csra.from_pretrained(tmp_path, lam=0).csra == timm_csra.CSRAConfig(0.0, (1.0, math.inf))
    assert timm_csra.from_pretrained(tmp_path, temperature=5).csra == timm_csra.CSRAConfig(0.3, 5.0)
    assert timm_csra.from_pretrained(tmp_path, scores="log_softmax").csra.scores == "log_softmax"
    assert timm_csra.from_pretrained(tmp_path, num_classes=6).num_classes == 6
    with pytest.raises(ValueError, match="lam must be finite"):
        timm_csra.from_pretrained(tmp_path, lam=-1)


def test_both_kinds_of_scores_come_back(tmp_path: Path) -> None:
    model = make(lam=0.3, temperature=math.inf, scores="log_softmax")
    timm_csra.save_pretrained(model, tmp_path)
    loaded = timm_csra.from_pretrained(tmp_path)
    assert loaded.csra == timm_csra.CSRAConfig(0.3, math.inf, "log_softmax")
    assert torch.equal(logits(loaded), logits(model))
    edit_config(tmp_path, csra={"version": 1, "lam": 0.3, "temperature": ["inf"]})  # what 0.1.0 wrote
    assert timm_csra.from_pretrained(tmp_path).csra == timm_csra.CSRAConfig(0.3, math.inf, "logits")


def test_saving_again_keeps_the_users_card_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    timm_csra.save_pretrained(make(), tmp_path)
    timm_csra.save_pretrained(make(lam=0.5), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert timm_csra.from_pretrained(tmp_path).csra.lam == 0.5
    assert len(list(tmp_path.iterdir())) == 4


def test_saving_fails_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="test_resnet: found a ResNet, expected a wrapped model: wrap it first"):
        timm_csra.save_pretrained(timm.create_model("test_resnet"), tmp_path)
    timm_csra.save_pretrained(make(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(ModelCard, "save", full)
    with pytest.raises(OSError, match="No space left"):
        timm_csra.save_pretrained(make(lam=0.9), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_create_model_wraps_what_timm_creates() -> None:
    model = timm_csra.create_model("test_resnet", pretrained=False, lam=0.2, temperature=5, num_classes=3)
    assert (model.csra.lam, model.csra.temperature, model.num_classes, model.training) == (0.2, (5.0,), 3, True)
    with pytest.raises(ValueError, match="lam must be finite and at least 0, got -1"):
        timm_csra.create_model("resnet152", lam=-1)  # before anything is downloaded
    with pytest.raises(ValueError, match="scores must be 'logits' or 'log_softmax', got 'both'"):
        timm_csra.create_model("resnet152", scores="both")
    model = timm_csra.create_model("test_resnet", pretrained=False, lam=0.3, scores="log_softmax")
    assert model.csra == timm_csra.CSRAConfig(0.3, math.inf, "log_softmax")


# What is refused


BAD_SETTINGS = {
    "a newer version": ({"version": 3, "lam": 0.1, "temperature": ["inf"]}, ValueError, "csra: found version 3, expected 1 or 2"),
    "a version of a half": ({"version": 1.0, "lam": 0.1, "temperature": ["inf"]}, ValueError, "csra: found version 1.0, expected 1 or 2"),
    "scores in version 1": ({"version": 1, "lam": 0.1, "temperature": [1], "scores": "logits"}, ValueError, "expected version, lam, temperature in version 1"),
    "no scores": ({"version": 2, "lam": 0.1, "temperature": [1]}, ValueError, "expected version, lam, temperature, scores in version 2"),
    "unknown scores": ({"version": 2, "lam": 0.1, "temperature": [1], "scores": "sum"}, ValueError, "scores must be 'logits' or 'log_softmax', got 'sum'"),
    "scores a list": ({"version": 2, "lam": 0.1, "temperature": [1], "scores": ["logits"]}, TypeError, "scores must be 'logits' or 'log_softmax', got"),
    "no version": ({"lam": 0.1, "temperature": ["inf"]}, ValueError, "found version None"),
    "a boolean version": ({"version": True, "lam": 0.1, "temperature": ["inf"]}, ValueError, "found version True"),
    "unknown keys": ({"version": 1, "lam": 0.1, "temperature": [1], "code": "x"}, ValueError, "code; expected version, lam"),
    "missing keys": ({"version": 1, "lam": 0.1}, ValueError, "found version, lam; expected version, lam, temperature"),
    "a list": ([0.1], TypeError, "csra: found a list, expected an object"),
    "lam a string": ({"version": 1, "lam": "0.1", "temperature": ["inf"]}, TypeError, "lam must be a real number, got '0.1'"),
    "lam a boolean": ({"version": 1, "lam": True, "temperature": ["inf"]}, TypeError, "lam must be a real number"),
    "lam NaN": ({"version": 1, "lam": math.nan, "temperature": ["inf"]}, ValueError, "lam must be finite"),
    "lam infinite": ({"version": 1, "lam": math.inf, "temperature": ["inf"]}, ValueError, "lam must be finite"),
    "lam negative": ({"version": 1, "lam": -0.1, "temperature": ["inf"]}, ValueError, "lam must be finite and at least 0"),
    "no temperature": ({"version": 1, "lam": 0.1, "temperature": []}, ValueError, "temperature must hold at least one"),
    "temperature 0": ({"version": 1, "lam": 0.1, "temperature": [0]}, ValueError, "temperature must be positive, got 0"),
    "temperature NaN": ({"version": 1, "lam": 0.1, "temperature": [math.nan]}, ValueError, "temperature must be positive"),
    "temperature text": ({"version": 1, "lam": 0.1, "temperature": ["hot"]}, TypeError, "temperature must be a positive number"),
    "temperature no list": ({"version": 1, "lam": 0.1, "temperature": 1}, TypeError, "found temperature 1, expected a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_are_not_trusted(case: str, tmp_path: Path) -> None:
    settings, error, text = BAD_SETTINGS[case]
    timm_csra.save_pretrained(make(), tmp_path)
    edit_config(tmp_path, csra=settings)
    with pytest.raises(error, match=text) as caught:
        timm_csra.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"local-dir:{tmp_path}: config.json, csra: ")


BAD_CONFIGS = {
    "no architecture": ({"architecture": None}, "config.json has no architecture; expected the name of a timm model"),
    "an unknown one": ({"architecture": "resnet_of_tomorrow"}, "names the architecture 'resnet_of_tomorrow', which timm .* does not have"),
    "arguments that load files": ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "has model_args {'checkpoint_path'"),
    "a device, where it is only counted": ({"model_args": {"device": "cpu"}}, "has model_args {'device': 'cpu'}"),
    "arguments no model has": ({"model_args": {"depth_of_field": 3}}, "timm cannot build the model that config.json describes: .*depth_of"),
    "other weights": ({"num_classes": 7}, r"of another shape: fc.bias \(found \(1000,\), expected \(7,\)\), fc.weight"),
    "another architecture": ({"architecture": "test_vit"}, "missing: .*blocks.0.attn.proj.bias.*; unexpected: bn1.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_are_not_trusted(case: str, tmp_path: Path) -> None:
    changes, text = BAD_CONFIGS[case]
    timm_csra.save_pretrained(make(), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=text):
        timm_csra.from_pretrained(tmp_path)


def test_every_weight_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    timm_csra.save_pretrained(make(), tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["bn1.weight"] = weights.pop("fc.weight")
    weights["surprise"] = weights.pop("fc.bias")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the weights do not fit test_resnet") as caught:
        timm_csra.from_pretrained(tmp_path, num_classes=3)  # timm alone would be lenient here
    for part in ("missing: ", "fc.weight", "fc.bias", "unexpected: surprise", "of another shape: bn1.weight (found"):
        assert part in str(caught.value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    timm_csra.save_pretrained(make(), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .*Download or save it again"):
        timm_csra.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        timm_csra.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"found no config.json; expected a folder in timm's format"):
        timm_csra.from_pretrained(tmp_path)


@pytest.mark.parametrize("found", [None, [1], "x"])
def test_a_pretrained_cfg_that_is_no_object_is_named(found: object, tmp_path: Path) -> None:
    timm_csra.save_pretrained(make(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": found}))
    with pytest.raises(ValueError, match=r"config.json has pretrained_cfg .*; expected an object"):
        timm_csra.from_pretrained(tmp_path)


@pytest.mark.parametrize("argument", [{"pretrained": False}, {"checkpoint_path": "/nope"}])
def test_other_weights_than_those_of_the_folder_are_refused(argument: dict[str, Any], tmp_path: Path) -> None:
    timm_csra.save_pretrained(make(), tmp_path)
    with pytest.raises(TypeError, match=rf"found the argument {next(iter(argument))}, but from_pretrained loads"):
        timm_csra.from_pretrained(tmp_path, **argument)


class Exploit:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code from a pickle has run')",)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    model = make()
    timm_csra.save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found no model.safetensors, .*pickled weights are not read"):
        timm_csra.from_pretrained(tmp_path)
    edit_config(tmp_path, csra=None)  # then it is timm's affair, which reads tensors and runs no code
    assert torch.equal(plain_logits(timm_csra.from_pretrained(tmp_path)), plain_logits(model))
    torch.save({"fc.bias": Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=r"pytorch_model.bin: cannot be read with weights_only=True: .*is refused. If you trust the file",
    ):
        timm_csra.from_pretrained(tmp_path)


NAMES = {
    "resnet50": "found no such folder; expected user/repo on the Hub, an existing folder, or file:ARCH@PATH. For timm's model of this name use create_model",
    "no/such/folder": "found no such folder; expected user/repo on the Hub, an existing folder, or file:ARCH@PATH",
    "hf-hub:user/repo@one": "found a second revision, revision='two'",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=NAMES[name]):
        timm_csra.from_pretrained(name, revision="two" if "@" in name else None)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found revision='main' with a folder"):
        timm_csra.from_pretrained(tmp_path, revision="main")


# The Hub


def test_push_and_load_in_four_ways(hub: Hub, tmp_path: Path) -> None:
    model = make(num_classes=2, pretrained_cfg_overlay={"label_names": ["cat", "dog"]})
    info = timm_csra.push_to_hub(model, "user/animals", token=WRITER)
    repo = hub.repos["user/animals"]
    assert (len(repo.commits), info.oid) == (2, repo.sha(1))  # the empty one, and one for all files
    assert sorted(repo.commits[-1]) == ["README.md", "config.json", "model.safetensors"]

    wrapped = timm_csra.from_pretrained("user/animals")
    assert wrapped.csra == model.csra
    assert torch.equal(logits(wrapped), logits(model))
    assert wrapped.pretrained_cfg["hf_hub_id"] == "user/animals"
    at_commit = timm_csra.from_pretrained(f"hf-hub:user/animals@{info.oid}", cache_dir=tmp_path / "elsewhere")
    assert torch.equal(logits(at_commit), logits(model))

    plain = timm.create_model("hf-hub:user/animals", pretrained=True)
    assert torch.equal(logits(plain), plain_logits(model))
    if not TORCHAO_LOADS:
        pytest.skip(f"torch {torch.__version__} is too old for torchao: loading by transformers did NOT run")
    theirs = transformers.AutoModelForImageClassification.from_pretrained("user/animals").eval()
    assert type(theirs).__name__ == "TimmWrapperForImageClassification"
    with torch.inference_mode():
        assert torch.equal(theirs(IMAGES).logits, plain_logits(model))
    assert theirs.config.id2label == {0: "cat", 1: "dog"}


def test_every_push_is_one_commit_and_leaves_a_card_alone(hub: Hub) -> None:
    timm_csra.push_to_hub(make(), "user/model", token=WRITER, private=True)
    repo = hub.repos["user/model"]
    assert repo.private
    repo.commits[-1]["README.md"] = b"my own words"
    timm_csra.push_to_hub(make(lam=0.7), "user/model", token=WRITER)
    assert (len(repo.commits), repo.commits[-1]["README.md"]) == (3, b"my own words")
    assert timm_csra.from_pretrained("user/model", token=READER).csra.lam == 0.7

    timm_csra.push_to_hub(make(lam=0.8), "user/model", token=WRITER, revision="trial")
    info = timm_csra.push_to_hub(make(lam=0.9), "user/model", token=WRITER, create_pr=True)
    assert info.pr_url and info.pr_url.endswith("/discussions/1")
    lams = [
        timm_csra.from_pretrained("user/model", revision=revision, token=READER).csra.lam
        for revision in (None, "trial", "refs/pr/1")
    ]
    assert lams == [0.7, 0.8, 0.9]


def test_a_push_that_fails_leaves_nothing(hub: Hub) -> None:
    with pytest.raises(TypeError, match="wrap it first"):
        timm_csra.push_to_hub(timm.create_model("test_resnet"), "user/model", token=WRITER)
    with pytest.raises(HfHubHTTPError, match="403"):
        timm_csra.push_to_hub(make(), "user/model", token=READER)
    with pytest.raises(HfHubHTTPError, match="401"):
        timm_csra.push_to_hub(make(), "user/model", token="hf_expired")
    assert not hub.repos
    hub.faults = [("POST /api/models/user/model/commit", 500)]
    with pytest.raises(HfHubHTTPError, match="500"):
        timm_csra.push_to_hub(make(), "user/model", token=WRITER)
    assert len(hub.repos["user/model"].commits) == 1
    timm_csra.push_to_hub(make(), "user/model", token=WRITER)
    assert len(hub.repos["user/model"].commits) == 2


def push(hub: Hub, tmp_path: Path, name: str, private: bool = False, **changes: object) -> nn.Module:
    model = make()
    timm_csra.save_pretrained(model, tmp_path / name)
    if changes:
        edit_config(tmp_path / name, **changes)
    hub.add(f"user/{name}", tmp_path / name, private)
    return model


@pytest.mark.parametrize("fault", [500, 503])
def test_a_download_that_the_hub_fails_can_be_repeated(fault: int, hub: Hub, tmp_path: Path) -> None:
    model = push(hub, tmp_path, "model")
    hub.faults = [("GET /blobs/", fault)]
    with pytest.raises(HfHubHTTPError, match=str(fault)):
        timm_csra.from_pretrained("user/model")
    assert torch.equal(logits(timm_csra.from_pretrained("user/model")), logits(model))


@pytest.mark.parametrize("fault", [429, "cut"])
def test_a_download_is_tried_again(fault: int | str, hub: Hub, tmp_path: Path) -> None:
    model = push(hub, tmp_path, "model")
    hub.faults = [("GET /blobs/", fault)]
    assert torch.equal(logits(timm_csra.from_pretrained("user/model")), logits(model))
    assert not hub.faults


def test_a_download_that_is_cut_for_good_does_not_poison_the_cache(hub: Hub, tmp_path: Path) -> None:
    model = push(hub, tmp_path, "model")
    hub.faults = [("GET /blobs/", 404)]
    with pytest.raises(HfHubHTTPError):
        timm_csra.from_pretrained("user/model")
    hub.faults = [("GET /blobs/", "cut")] * 20
    with pytest.raises(Exception, match="(?i)peer closed|incomplete|consistency|size"):
        timm_csra.from_pretrained("user/model")
    hub.faults = []
    assert torch.equal(logits(timm_csra.from_pretrained("user/model")), logits(model))


def test_offline_the_cache_serves(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = push(hub, tmp_path, "model")
    timm_csra.from_pretrained("user/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    assert torch.equal(logits(timm_csra.from_pretrained("user/model")), logits(model))
    with pytest.raises(LocalEntryNotFoundError, match="cannot find the requested files in the local cache"):
        timm_csra.from_pretrained("user/other")
    assert len(hub.requests) == count


def test_private_repositories_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    model = push(hub, tmp_path, "secret", private=True)
    with pytest.raises(RepositoryNotFoundError, match="make sure you are authenticated"):
        timm_csra.from_pretrained("user/secret")
    assert torch.equal(logits(timm_csra.from_pretrained("user/secret", token=READER)), logits(model))


def test_a_repository_of_plain_timm_is_wrapped_with_a_note(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = push(hub, tmp_path, "plain", csra=None)
    with caplog.at_level(logging.WARNING, "timm_csra"):
        loaded = timm_csra.from_pretrained("user/plain", lam=0.3, temperature=(1, math.inf))
    assert "hf-hub:user/plain: config.json has no settings of timm_csra; wrapped with CSRAConfig(lam=0.3" in caplog.text
    assert torch.equal(logits(loaded), logits(model))


def test_weights_on_the_hub_are_safetensors_where_settings_are_stored(hub: Hub, tmp_path: Path) -> None:
    model = push(hub, tmp_path, "pickled")
    del hub.repos["user/pickled"].commits[-1]["model.safetensors"]
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    hub.repos["user/pickled"].commits[-1]["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    with pytest.raises(ValueError, match=r"hf-hub:user/pickled: found no model.safetensors, .*pickled weights"):
        timm_csra.from_pretrained("user/pickled")
    assert not any("pytorch_model.bin" in request for request in hub.requests)
    config = json.loads(hub.repos["user/pickled"].commits[-1]["config.json"])
    config.pop("csra")
    hub.repos["user/pickled"].commits[-1]["config.json"] = json.dumps(config).encode()
    loaded = timm_csra.from_pretrained("user/pickled", cache_dir=tmp_path / "second")
    assert torch.equal(plain_logits(loaded), plain_logits(model))
    del hub.repos["user/pickled"].commits[-1]["pytorch_model.bin"]
    with pytest.raises(ValueError, match="found no weights; expected one of model.safetensors, pytorch_model.bin"):
        timm_csra.from_pretrained("user/pickled", cache_dir=tmp_path / "third")


def test_no_token_is_logged(hub: Hub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.DEBUG):
        huggingface_hub.utils.logging.set_verbosity_debug()
        try:
            timm_csra.push_to_hub(make(), "user/model", token=WRITER, private=True)
            timm_csra.from_pretrained("user/model", token=WRITER)
            with pytest.raises(HfHubHTTPError) as caught:
                timm_csra.push_to_hub(make(), "user/other", token=READER)
        finally:
            huggingface_hub.utils.logging.set_verbosity_warning()
    written = caplog.text + "".join(capfd.readouterr()) + str(caught.value)
    assert caplog.text
    assert WRITER not in written and READER not in written


# The card


def record(model: nn.Module, **changes: object) -> dict[str, object]:
    row = {"metric": "lrap", "n": 44, "lam": "0.1", "temperature": "inf", "baseline": 31.88, "value": 35.55, "gain": 3.67,
           "ci_low": 2.32, "ci_high": 5.07, "protocol": "fixed", "scores": "logits"}  # fmt: skip
    crossfit = row | {"protocol": "crossfit", "lam": "0.5;1", "temperature": "1;inf", "gain": 6.13, "value": 38.01,
                      "scores": "log_softmax;logits"}  # fmt: skip
    softened = row | {
        "protocol": "fixed_log_softmax",
        "lam": "0.3",
        "scores": "log_softmax",
        "gain": 3.52,
        "value": 35.4,
    }
    between = softened | {"protocol": "log_softmax_vs_logits", "baseline": 35.55, "gain": -0.15}
    best = row | {"protocol": "best", "ci_low": None, "ci_high": None}
    return {
        "status": "ok", "weights_sha256": weights_sha256(model), "model": "mine", "data": "imagenette500", "n": 125,
        "task": "mosaic", "img_size": 224, "results": [row, softened, between, crossfit, best],
        **changes,
    }  # fmt: skip


def test_the_card_says_what_it_is_and_how_to_use_it(tmp_path: Path) -> None:
    model = make(lam=0.1, temperature=math.inf)
    timm_csra.save_pretrained(model, tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "apache-2.0" or card.data.license == model.pretrained_cfg.get("license", "unknown")
    assert {"timm", "timm_csra", "image-classification"} <= set(card.data.tags)
    assert card.data.base_model == model.pretrained_cfg["hf_hub_id"]
    for words in (
        "`test_resnet` with 1000\nclasses",
        "| lam | 0.1 |",
        "| temperature T | inf |",
        "| scores | logits |",
        "Logits grow by a factor of about 1 + lam",
        "timm_csra.from_pretrained(",
    ):
        assert words in card.text
    assert "## Measured" not in card.text
    code = [block.split("```")[0] for block in card.text.split("```python\n")[1:]]
    for block in code:  # both ways work as they are written
        if "timm_csra" not in block:
            plain_timm(tmp_path / "model")
        namespace: dict[str, nn.Module] = {}
        exec(block, namespace)
        assert namespace["model"].num_classes == 1000


@pytest.mark.parametrize(
    ("license", "expected", "words"),
    [
        (None, {"license": "unknown"}, "The licence is unknown: the checkpoint does not state one."),
        ("unknown", {"license": "unknown"}, "The licence is unknown"),
        ("cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}, "The licence is the checkpoint's: cc-by-nc-4.0."),
        (
            "apple-ascl",
            {"license": "other", "license_name": "apple-ascl"},
            "The licence is the checkpoint's: apple-ascl.",
        ),
    ],
)
def test_the_licence_is_the_checkpoints(license: str | None, expected: dict, words: str, tmp_path: Path) -> None:
    model = make()
    model.pretrained_cfg = {**model.pretrained_cfg, "license": license, "hf_hub_id": None}
    timm_csra.save_pretrained(model, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert {key: data[key] for key in expected} == expected
    assert words in card.text
    assert "The base checkpoint is unknown" in card.text and "base_model" not in data


def test_the_card_has_what_was_measured(tmp_path: Path) -> None:
    model = make(lam=0.1, temperature=math.inf)
    timm_csra.save_pretrained(model, tmp_path, results=record(model))
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        "| imagenette500, mosaic | 224 | 44 | lrap | fixed | logits | 0.1 | inf | 31.88 | 35.55 | +3.67 [+2.32, +5.07] |"
        in card.text
    )
    assert "| crossfit | log_softmax;logits | 0.5;1 | 1;inf | 31.88 | 38.01 | +6.13" in card.text
    assert "| fixed_log_softmax |" not in card.text  # not what this model does
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "lrap, plain": 31.88, "lrap, wrapped, fixed": 35.55, "lrap, wrapped, crossfit": 38.01,
    }  # fmt: skip
    wrapped = results["lrap, wrapped, fixed"]
    assert wrapped.dataset_name == "imagenette500, mosaic, 224 px, 125 pictures"
    assert [wrapped.metric_args[name] for name in ("ci_low", "scores", "n")] == [2.32, "logits", 44]
    assert "n is the number of pictures that the metric counts." in card.text

    other = make(lam=0.4)  # `fixed` is not what this model does
    timm_csra.save_pretrained(other, tmp_path / "other", results=[record(other)])
    assert "| fixed |" not in (tmp_path / "other" / "README.md").read_text()


def test_the_card_of_log_softmax_has_its_own_figures(tmp_path: Path) -> None:
    model = make(lam=0.3, temperature=math.inf, scores="log_softmax")
    timm_csra.save_pretrained(model, tmp_path, results=record(model))
    text = (tmp_path / "README.md").read_text()
    assert "| scores | log_softmax |" in text
    assert "| lrap | fixed_log_softmax | log_softmax | 0.3 | inf | 31.88 | 35.40 | +3.52" in text
    assert "| fixed |" not in text and "| log_softmax_vs_logits |" not in text
    assert "a log-probability, which is at most 0, is added to each logit" in text


def test_records_of_an_earlier_version_are_of_logits(tmp_path: Path) -> None:
    model = make(lam=0.1, temperature=math.inf)
    before = record(model)
    for row in before["results"]:  # type: ignore[attr-defined]
        del row["scores"], row["n"]
    before["results"] = [row for row in before["results"] if "log_softmax" not in row["protocol"]]  # type: ignore
    timm_csra.save_pretrained(model, tmp_path, results=before)
    text = (tmp_path / "README.md").read_text()
    # Which of the 125 pictures counted for it such a record does not say.
    assert "| imagenette500, mosaic | 224 | - | lrap | fixed | logits | 0.1 | inf |" in text
    assert "| crossfit | logits;logits | 0.5;1 |" in text


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ({"weights_sha256": "another"}, "the record of mine on imagenette500 was measured with other weights"),
        ({"results": None, "status": "failed"}, "found status 'failed'; expected finished records"),
        ("records", "found a str; expected finished records"),
    ],
)
def test_records_of_something_else_are_refused(results: object, text: str, tmp_path: Path) -> None:
    model = make()
    given = record(model, **results) if isinstance(results, dict) else [results]
    with pytest.raises(ValueError, match=text):
        timm_csra.save_pretrained(model, tmp_path, results=given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
