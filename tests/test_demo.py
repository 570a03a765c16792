"""The page to try it: what it computes, against the library; and the page itself, in a real browser."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_csra

pytest.importorskip("gradio", reason="the extra `demo` is not installed: nothing here says whether the page works")
import gradio as gr

from benchmarks.checkpoints.find import PYPI
from timm_csra import demo
from timm_csra.config import SCORES
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX

SCREENSHOTS = Path(os.environ.get("TIMM_CSRA_SCREENSHOTS", "screenshots"))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.effect_noise((300, 200), 90).convert("RGB").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def random_model(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    monkeypatch.setattr(demo, "load", lambda name: model)
    return model


@pytest.mark.parametrize("temperature", [0.5, 3.0, math.inf])
@pytest.mark.parametrize("lam", [0.0, 0.1, 1.5])
@pytest.mark.parametrize("scores", SCORES)
def test_recombined_scores_are_what_the_wrapped_model_says(
    lam: float, temperature: float, scores: str, photo: str, random_model: torch.nn.Module
) -> None:
    seen = demo.look("any", photo)
    config = timm.data.resolve_data_config(model=random_model) | {"crop_mode": "squash", "crop_pct": 1.0}
    x = timm.data.create_transform(**config)(seen.picture)[None]
    model = timm_csra.wrap(random_model, lam, temperature, scores)
    with torch.inference_mode():
        torch.testing.assert_close(seen.logits(lam, temperature, scores), model(x)[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(seen.maps_of(scores), timm_csra.score_maps(model, x, scores=scores)[0])
    timm_csra.unwrap(random_model)


@pytest.mark.parametrize("scores", SCORES)
def test_tables_and_maps(scores: str, photo: str, random_model: torch.nn.Module) -> None:
    seen = demo.look("any", photo)
    before, after, maps = demo.show(seen, 1.0, 1.0, True, scores)
    assert [row[1] for row in before] == [seen.names[i] for i in seen.base.topk(6).indices]
    assert [row[1] for row in after] == [seen.names[i] for i in seen.logits(1.0, math.inf, scores).topk(6).indices]
    assert {row[1] for row in before} | {row[1] for row in after} == {caption.rsplit(" (", 1)[0] for _, caption in maps}
    assert all(picture.size == seen.picture.size for picture, _ in maps)
    highest = seen.maps_of(scores).amax(dim=(1, 2))
    for _, caption in maps:
        name, value = caption.rstrip(")").rsplit(" (", 1)
        assert float(value) == pytest.approx(highest[seen.names.index(name)].item(), abs=0.051)
    assert demo.show(None, 1.0, 1.0, True, scores) == (None, None, [])


def test_the_precision_of_the_device_is_used(
    photo: str, random_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    float32 = demo.look("any", photo)
    monkeypatch.setattr(demo, "precision", lambda asked, device: "bf16")
    seen = demo.look("any", photo)
    for found, expected in ((seen.base, float32.base), (seen.maps, float32.maps)):
        assert found.dtype == torch.float32 and found.device.type == "cpu"
        assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.cuda
def test_a_model_is_on_the_gpu_and_what_is_seen_is_not(photo: str, cuda: torch.device) -> None:
    name = demo.installed_wheels()[0]
    model, seen = demo.load(name), demo.look(name, photo)
    assert {weight.device.type for weight in model.parameters()} == {cuda.type}
    assert seen.base.device.type == seen.maps.device.type == "cpu"


def test_each_kind_of_scores_has_its_usual_lam() -> None:
    assert {setting.scores: setting.lam for setting in (DEFAULT, DEFAULT_LOG_SOFTMAX)} == demo.USUAL_LAM


def test_what_cannot_be_shown_is_told(tmp_path: Path, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    with pytest.raises(gr.Error, match="This file cannot be read as a picture"):
        demo.open_picture(str(text))
    half = tmp_path / "half.png"
    half.write_bytes(Path(photo).read_bytes()[:500])
    with pytest.raises(gr.Error, match="This file cannot be read as a picture"):
        demo.open_picture(str(half))
    monkeypatch.setattr(demo, "PIXELS", 1000)
    with pytest.raises(gr.Error, match=r"The picture has 300 x 200 pixels; expected at most"):
        demo.open_picture(photo)
    with pytest.raises(gr.Error, match="Choose a picture first"):
        demo.look("resnet18", None)
    with pytest.raises(gr.Error, match="timm has no model called 'resnet_of_tomorrow'"):
        demo.load("resnet_of_tomorrow")


def test_without_network_the_wheels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        gr.Error, match=r"resnet18.a1_in1k could not be downloaded.*Without network these work: tf_efficientnet_lite0"
    ):
        demo.load("resnet18.a1_in1k")


@pytest.fixture
def trained(tmp_path: Path) -> str:
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, tmp_path / "best.pth.tar")
    return f"file:test_resnet@{tmp_path / 'best.pth.tar'}"


def test_a_trained_file_is_shown_where_it_is_offered(photo: str, trained: str, tmp_path: Path) -> None:
    seen = demo.look(trained, photo, {trained: ("cat", "dog", "bird")})
    assert seen.names == ("cat", "dog", "bird")
    assert demo.look(trained, photo, {trained: ()}).names == ("0", "1", "2")
    for offered in (None, {}, {"resnet18": ()}):
        with pytest.raises(gr.Error, match="Files are only read where the page was started with them"):
            demo.look(trained, photo, offered)
    gone = f"file:test_resnet@{tmp_path / 'gone.pth'}"
    with pytest.raises(gr.Error, match="gone.pth not found; expected a checkpoint of timm's train script"):
        demo.look(gone, photo, {gone: ()})


def test_the_command_line_offers_files(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[gr.Blocks] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **_: served.append(page))
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nbird\n")
    demo.main(["--model", trained, "--class-names", str(names)])
    assert f"{trained}: state_dict of best.pth.tar, 3 classes" in capsys.readouterr().out
    (dropdown,) = (block for block in served[0].blocks.values() if getattr(block, "elem_id", "") == "model")
    assert dropdown.value == trained
    names.write_text("cat\ndog\n")
    for arguments, text in (
        (["--model", trained, "--class-names", str(names)], "names.txt: found 2 names, expected one for each of 3"),
        (["--model", "file:gone.pth"], "expected ARCH@PATH"),
    ):
        with pytest.raises(SystemExit):
            demo.main(arguments)
        assert text in capsys.readouterr().err


# In the browser


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The address of the app, on loopback."""
    app = demo.build()
    folders = sorted({str(Path(path).parent) for path in demo.installed_examples().values()})
    _, url, _ = app.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, max_file_size="1mb", allowed_paths=folders
    )
    yield url
    app.close()


@pytest.mark.browser
@pytest.mark.slow
def test_a_person_tries_it(page: str, chromium, photo: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    tab = chromium.new_page(viewport={"width": 1300, "height": 1000})
    tab.goto(page)
    tab.get_by_label("A cup, from scikit-image").click()
    after, before = tab.locator("#after"), tab.locator("#before")
    expect(before).to_contain_text("espresso", timeout=60_000)
    expect(after).to_contain_text("espresso")
    plain = before.inner_text()
    assert len(tab.locator("#maps img").all()) >= 6

    slider = tab.locator("#lam input[type=number]")
    first = re.findall(r"\d+\.\d+", after.inner_text())

    # The other scores bring the lam that they are meant to be used with.
    tab.locator("#scores").get_by_label("log_softmax").check()
    expect(slider).to_have_value("0.3")
    seen = demo.look(next(iter(demo.installed_wheels())), next(iter(demo.installed_examples().values())))
    for value in seen.logits(0.3, math.inf, "log_softmax").topk(demo.TOP).values.tolist():
        expect(after).to_contain_text(f"{round(value, 2):g}")
    SCREENSHOTS.mkdir(exist_ok=True, parents=True)
    tab.screenshot(path=SCREENSHOTS / "demo-log-softmax.png", full_page=True)
    tab.locator("#scores").get_by_label("logits", exact=True).check()
    expect(slider).to_have_value("0.1")
    expect(after).to_contain_text(first[0])

    # lam moves the wrapped table alone; at 0 both say the same.
    slider.fill("1.5")
    slider.press("Enter")
    expect(after).not_to_contain_text(first[0])
    assert before.inner_text() == plain
    tab.screenshot(path=SCREENSHOTS / "demo.png", full_page=True)
    slider.fill("0")
    slider.press("Enter")
    expect(after).to_contain_text(re.findall(r"\d+\.\d+", plain)[0])

    # What is no picture, what is too large, and a name that there is not, are told in the page.
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture at all")
    tab.locator("#upload input[type=file]").set_input_files(str(bad))
    expect(tab.locator(".toast-body")).to_contain_text("This file cannot be read as a picture", timeout=20_000)
    tab.screenshot(path=SCREENSHOTS / "demo-bad-file.png")
    tab.reload()
    huge = tmp_path / "huge.png"
    huge.write_bytes(os.urandom(2 * 2**20))
    tab.locator("#upload input[type=file]").set_input_files(str(huge))
    expect(tab.locator(".toast-body")).to_contain_text(re.compile("maximum allowed size", re.I), timeout=20_000)
    tab.reload()
    tab.locator("#upload input[type=file]").set_input_files(photo)
    expect(before).to_contain_text(re.compile(r"\d\.\d\d"), timeout=20_000)
    tab.close()


@pytest.mark.browser
@pytest.mark.slow
def test_no_network_is_told_in_the_page(page: str, chromium, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tab = chromium.new_page(viewport={"width": 400, "height": 900})
    tab.goto(page)
    tab.get_by_label("A cup, from scikit-image").click()
    expect(tab.locator("#before")).to_contain_text("espresso", timeout=60_000)
    name = tab.locator("#model input")
    name.fill("resnet18.a1_in1k")
    name.press("Enter")
    name.blur()
    expect(tab.locator(".toast-body")).to_contain_text("could not be downloaded", timeout=30_000)
    tab.screenshot(path=SCREENSHOTS / "demo-phone.png", full_page=True)
    tab.close()


def test_it_knows_the_wheels_that_the_sweep_knows() -> None:
    assert demo.WHEELS == PYPI  # the library cannot import the benchmarks
