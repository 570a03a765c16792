"""The page to try it: what it computes, against the library; what it says; and links to it."""

import argparse
import math
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image, ImageChops

import timm_csra

pytest.importorskip("gradio", reason="the extra `demo` is not installed: nothing here says whether the page works")

from timm_csra.config import LOG_SOFTMAX, LOGITS, SCORES
from timm_csra.demo import checkpoints, page, parts, seen
from timm_csra.demo.checkpoints import Checkpoint
from timm_csra.demo.link import MOST_LAM, USUAL_LAM
from timm_csra.demo.told import Refused
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX
from timm_csra.installed import installed_wheels
from timm_csra.trained import SIGMOID, SOFTMAX

NAMES = tuple(f"class <{index}> & more" for index in range(1000))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.effect_noise((300, 200), 90).convert("RGB").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def random() -> Checkpoint:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    return Checkpoint("test_resnet", model, timm_csra.explain(model), SOFTMAX)


@pytest.fixture
def looked(random: Checkpoint, photo: str) -> seen.Seen:
    return seen.look(random, photo, NAMES)


# What it computes


@pytest.mark.parametrize("temperature", [0.5, 3.0, math.inf])
@pytest.mark.parametrize("lam", [0.0, 0.1, 1.5])
@pytest.mark.parametrize("scores", SCORES)
def test_recombined_scores_are_what_the_wrapped_model_says(
    lam: float, temperature: float, scores: str, photo: str, random: Checkpoint, looked: seen.Seen
) -> None:
    config = timm.data.resolve_data_config(model=random.model) | {"crop_mode": "squash", "crop_pct": 1.0}
    squashed = Image.open(photo).resize((160, 160), Image.Resampling.BICUBIC)
    assert config["input_size"] == (3, 160, 160)
    x = timm.data.create_transform(**config)(squashed)[None]
    model = timm_csra.wrap(random.model, lam, temperature, scores)
    with torch.inference_mode():
        torch.testing.assert_close(looked.logits(lam, temperature, scores), model(x)[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(looked.maps_of(scores), timm_csra.score_maps(model, x, scores=scores)[0])
    timm_csra.unwrap(random.model)


def test_the_precision_of_the_device_is_used(
    photo: str, random: Checkpoint, looked: seen.Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "precision", lambda asked, device: "bf16")
    coarse = seen.look(random, photo, NAMES)
    for found, expected in ((coarse.base, looked.base), (coarse.maps, looked.maps)):
        assert found.dtype == torch.float32 and found.device.type == "cpu"
        assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.cuda
def test_a_model_is_on_the_gpu_and_what_is_seen_is_not(photo: str, cuda: torch.device) -> None:
    found = checkpoints.checkpoint(installed_wheels()[0], {})
    looked = seen.look(found, photo, found.class_names())
    assert {weight.device.type for weight in found.model.parameters()} == {cuda.type}
    assert looked.base.device.type == looked.maps.device.type == "cpu"


def test_each_kind_of_scores_has_its_usual_lam() -> None:
    assert {setting.scores: setting.lam for setting in (DEFAULT, DEFAULT_LOG_SOFTMAX)} == USUAL_LAM
    assert {scores: round(USUAL_LAM[scores] / most, 6) for scores, most in MOST_LAM.items()} == dict.fromkeys(
        SCORES, 0.1
    )


# What it says


def test_classes_have_the_given_names_or_those_of_the_model(random: Checkpoint) -> None:
    assert random.class_names(NAMES) == NAMES
    assert random.class_names()[281] == "tabby"  # of ImageNet's "tabby, tabby cat"
    with pytest.raises(Refused, match=r"test_resnet: --class-names has 2 names, expected 1000\."):
        random.class_names(NAMES[:2])
    random.model.pretrained_cfg = {"label_names": ["cat"]}
    with pytest.raises(Refused, match="found 1 names of classes, expected 1000"):
        random.class_names()


@pytest.mark.parametrize("scores", SCORES)
def test_a_list_has_the_highest_logits_and_what_moved(scores: str, looked: seen.Seen) -> None:
    torch.manual_seed(0)
    looked = replace(looked, maps=looked.maps + torch.randn(looked.maps.shape))  # noise alone moves nothing
    logits = looked.logits(3.0, math.inf, scores)
    html = parts.tags(looked, scores, logits, (int(logits.argmax()), scores))
    places = {index: place for place, index in enumerate(looked.base.argsort(descending=True).tolist(), 1)}
    items = html.split("<li>")[1:]
    assert len(items) == parts.TOP
    moved = 0
    for place, (item, index) in enumerate(zip(items, logits.topk(parts.TOP).indices.tolist(), strict=True), 1):
        assert f'data-class="{index}" data-scores="{scores}"' in item and f"{logits[index]:.2f}" in item
        assert f'aria-pressed="{str(place == 1).lower()}"' in item
        assert NAMES[index] in unescape(item) and NAMES[index] not in item  # a name is text, never HTML
        up = places[index] - place
        moved += up != 0
        assert (f"up {up} from plain" if up > 0 else f"down {-up} from plain" if up else "same place as plain") in item
    assert moved  # the test has seen some
    gone = [
        index for index in looked.base.topk(parts.TOP).indices.tolist() if index not in logits.topk(parts.TOP).indices
    ]
    assert all(f"{NAMES[index]} is now {1 + int((logits > logits[index]).sum())}" in unescape(html) for index in gone)


def test_a_list_of_the_same_order_says_so(looked: seen.Seen) -> None:
    assert "The same 6 tags as plain, in the same order." in parts.tags(looked, LOGITS, looked.base, None)
    few = seen.Seen(looked.picture, looked.path, looked.base[:3], looked.maps[:3], NAMES[:3], looked.checkpoint)
    assert "The same 3 tags as plain" in parts.tags(few, LOGITS, few.base, None)
    swapped = few.base[[1, 0, 2]]
    assert "The same tags as plain, in another order." in parts.tags(few, LOGITS, swapped, None)


@pytest.mark.parametrize("scores", SCORES)
def test_the_caption_names_the_spatial_maximum(scores: str, looked: seen.Seen) -> None:
    index = int(looked.base.argmax())
    html = parts.picture(looked, [(index, scores), (5, scores)], (index, scores))
    score_map = looked.maps_of(scores)[index]
    row, column = (score_map == score_map.max()).nonzero()[0].tolist()
    rows, columns = score_map.shape
    where = f"spatial maximum {score_map.max():z.2f} at row {row + 1} of {rows}, column {column + 1} of {columns}"
    assert html.count(where) == 2  # in the text in place of the picture, and below it
    both = looked.maps_of(scores)[[index, 5]]
    assert f"<span>{both.min():z.1f}</span>" in html and f"<span>{both.max():z.1f}</span>" in html


def test_maps_of_one_kind_share_a_scale(looked: seen.Seen) -> None:
    listed = [(1, LOGITS), (2, LOGITS), (3, LOG_SOFTMAX)]
    ends = [
        [part.split("<")[0] for part in parts.picture(looked, listed, (index, LOGITS)).split("<span>")[1:3]]
        for index in (1, 2)
    ]
    assert ends[0] == ends[1] == [f"{looked.maps[[1, 2]].min():z.1f}", f"{looked.maps[[1, 2]].max():z.1f}"]


def test_the_location_of_the_maximum_is_outlined() -> None:
    before = Image.new("RGB", (200, 100), (90, 20, 20))
    after = before.copy()
    parts._mark(after, 1, 2, 2, 4)
    assert ImageChops.difference(before, after).getbbox() == (100, 50, 150, 100)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("test_resnet", "exact", "Linear head after average pooling"),
        ("test_convnext", "nonlinear", "a hidden layer, an activation or another pooling"),
        ("test_vit", "token", "Class token or attention pooling"),
    ],
)
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (SOFTMAX, "Trained with softmax cross entropy"),
        (SIGMOID, "log_softmax is not meant for this checkpoint"),
        ("", "not known here"),
    ],
)
def test_the_kind_of_head_and_the_loss_are_told(name: str, kind: str, text: str, loss: str, said: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    found = timm_csra.explain(model)
    assert found.kind == kind
    html = parts.head(Checkpoint(name, model, found, loss))
    assert text in html and said in html and parts.WHY_NOT_LOG_SOFTMAX in html and f"{name}: 3 classes" in html


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        ({"bce_loss": True}, SIGMOID),
        ({"bce_loss": False}, SOFTMAX),
        ({"bce_loss": False, "multi_label": True}, SIGMOID),
        ({"bce_loss": False, "loss": "asl"}, ""),
        ({}, ""),
    ],
)
def test_the_loss_of_a_training_is_read(arguments: dict[str, Any], loss: str, tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    saved = {"state_dict": state, "args": argparse.Namespace(model="test_resnet", **arguments)}
    torch.save(saved, tmp_path / "last.pth.tar")
    name = f"file:test_resnet@{tmp_path / 'last.pth.tar'}"
    assert checkpoints.checkpoint(name, {name: name}).loss == loss


def test_the_loss_of_published_checkpoints_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **_: create("test_resnet"))
    losses = {
        name: checkpoints._create(name, name)[1] for name in ("resnet50.a1_in1k", "convnext_tiny.fb_in1k", "resnet18")
    }
    assert losses == {"resnet50.a1_in1k": SIGMOID, "convnext_tiny.fb_in1k": SOFTMAX, "resnet18": ""}


def test_what_cannot_be_shown_is_told(tmp_path: Path, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    half = tmp_path / "half.png"
    half.write_bytes(Path(photo).read_bytes()[:500])
    vectors = tmp_path / "vectors.png"  # which Pillow would give to Ghostscript
    vectors.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(Refused, match="cannot identify image file"):
        seen.open_picture(str(vectors))
    for file in (text, half):
        with pytest.raises(Refused, match="^This file cannot be read as a picture") as told:
            seen.open_picture(str(file))
        assert str(tmp_path) not in str(told.value)
    with pytest.raises(Refused, match="uploads are deleted after an hour"):
        seen.open_picture(str(tmp_path / "gone.png"))
    monkeypatch.setattr(seen, "PIXELS", 1000)
    with pytest.raises(Refused, match=r"^The picture has 300 x 200 pixels; expected at most"):
        seen.open_picture(photo)
    with pytest.raises(Refused, match="Choose a picture first"):
        page._Page({}).look("resnet18", None)
    with pytest.raises(Refused, match="timm has no model called 'resnet_of_tomorrow'"):
        checkpoints.checkpoint("resnet_of_tomorrow", {})
    for nothing in ("", " "):
        with pytest.raises(Refused, match="Choose a checkpoint first"):
            checkpoints.checkpoint(nothing, {})


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2000, 1), (3, 1500), (40, 40)])
def test_the_smallest_and_the_longest_pictures_are_shown(
    size: tuple[int, int], tmp_path: Path, random: Checkpoint
) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "small.png")
    found = seen.look(random, str(tmp_path / "small.png"), NAMES)
    for index in range(0, 1000, 99):
        assert "<img" in parts.picture(found, [(index, LOGITS)], (index, LOGITS))
    assert min(found.picture.size) >= seen.LEAST and max(found.picture.size) <= seen.SHOWN
    for place in range(49):  # where a location is smaller than its outline
        parts._mark(Image.new("RGB", (5, 5)), *divmod(place, 7), 7, 7)


def test_a_picture_is_upright_and_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 20), "red")
    picture.paste("blue", (0, 0, 15, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    found = seen.open_picture(str(tmp_path / "turned.png"))
    assert found.size == (20, 30) and found.getpixel((10, 5)) == (0, 0, 255) and found.getpixel((10, 25)) == (255, 0, 0)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert seen.open_picture(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    Image.new("P", (2, 2)).save(tmp_path / "palette.png", transparency=0)
    assert seen.open_picture(str(tmp_path / "palette.png")).getpixel((0, 0)) == (255, 255, 255)


def test_a_decompression_bomb_has_a_sentence_of_its_own(photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Refused, match=r"^The picture has far too many pixels; expected at most 50 million\. Make"):
        seen.open_picture(photo)


def test_what_changed_is_said(looked: seen.Seen) -> None:
    assert parts.spoken(looked, {"plain": 1, LOGITS: 2}, (2, LOGITS)) == (
        "First tags: plain class <1> & more; logits class <2> & more. Map of class <2> & more, per-location logits."
    )
    assert parts.spoken(looked, {"plain": 1}, None).endswith("No map.")


def test_what_cannot_be_wrapped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    monkeypatch.setattr(checkpoints, "_create", lambda name, source: (model, ""))
    with pytest.raises(Refused, match="num_classes"):
        checkpoints.checkpoint("headless", {"headless": "headless"})


def test_visitors_cannot_load_the_largest_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offered one is loaded whatever its size."""
    model = timm.create_model("test_resnet").eval()
    monkeypatch.setattr(checkpoints, "_create", lambda name, source: (model, ""))
    checkpoints._load.cache_clear()
    name = "vit_giant_patch14_dinov2"
    with pytest.raises(
        Refused,
        match=r"^vit_giant_patch14_dinov2 has 1,136 million parameters; visitors can load models of up to 700 million. "
        r"Whoever runs this page can offer it with --model.$",
    ):
        checkpoints.checkpoint(name, {})
    assert checkpoints.checkpoint(name, {name: name}).model is model
    assert checkpoints.checkpoint("test_resnet", {}).model is model
    checkpoints._load.cache_clear()


def test_without_network_the_wheels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        Refused, match=r"resnet18.a1_in1k could not be downloaded.*Without network these work: tf_efficientnet_lite0"
    ):
        checkpoints.checkpoint("resnet18.a1_in1k", {})
