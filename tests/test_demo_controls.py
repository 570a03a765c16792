"""The controls of the page to try it, in a real browser: pressed fast, wrongly, by keyboard, and by several at once."""

import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import timm

pytest.importorskip("gradio", reason="the extra `demo` is not installed: nothing here says whether the page works")
from tests.test_demo_browser import DESKTOP, open_page, upload
from timm_csra.demo import checkpoints, launch
from timm_csra.trained import SOFTMAX

pytestmark = [pytest.mark.browser, pytest.mark.slow]
LITE0, LITE1 = "tf_efficientnet_lite0", "tf_efficientnet_lite1"


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The address of the app, on loopback."""
    app, url, _ = launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url
    app.get_blocks().close()


def expect_shown(tab: Any, checkpoint: str, example: str, first: str) -> None:
    """Wait until the lists, the controls, the head and the link say the same."""
    from playwright.sync_api import expect

    expect(tab.locator("#plain button.tag").first).to_contain_text(first, timeout=30_000)
    expect(tab.locator("#head")).to_contain_text(f"{checkpoint}: 1,000 classes", timeout=30_000)
    expect(tab.locator("#model input")).to_have_value(checkpoint)
    expect(tab.locator(f"#examples input[value={example}]")).to_be_checked()
    said = parse_qs(urlparse(tab.locator("#link-text").input_value()).query)
    assert (said["checkpoint"], said["picture"]) == ([checkpoint], [example])


def choose(tab: Any, checkpoint: str) -> None:
    tab.locator("#model input").fill(checkpoint)
    tab.keyboard.press("Enter")


def test_the_last_of_fast_changes_is_shown(page: str, chromium: Any) -> None:
    tab = open_page(chromium, page)
    cat, astronaut = tab.get_by_label("A cat, from"), tab.get_by_label("An astronaut, from")
    cat.check()
    astronaut.check()
    expect_shown(tab, LITE0, "astronaut", "bobsled")
    choose(tab, LITE1)
    cat.check()
    expect_shown(tab, LITE1, "chelsea", "Egyptian cat")
    astronaut.check()
    choose(tab, LITE0)
    expect_shown(tab, LITE0, "astronaut", "bobsled")
    tab.close()


def test_after_a_failure_the_controls_say_what_is_shown(page: str, chromium: Any, tmp_path: Any) -> None:
    from playwright.sync_api import expect

    tab = open_page(chromium, page)
    choose(tab, "no_such_model")
    expect(tab.locator(".toast-body")).to_contain_text("timm has no model called 'no_such_model'", timeout=20_000)
    expect_shown(tab, LITE0, "coffee", "espresso")
    (tmp_path / "bad.png").write_text("no picture")
    upload(tab, str(tmp_path / "bad.png"))
    expect(tab.locator(".toast-body").filter(has_text="cannot be read as a picture")).to_be_visible(timeout=20_000)
    expect_shown(tab, LITE0, "coffee", "espresso")
    tab.get_by_label("A cat, from").check()
    expect_shown(tab, LITE0, "chelsea", "Egyptian cat")
    tab.close()


def test_who_downloads_keeps_nobody_else_waiting(page: str, chromium: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from playwright.sync_api import expect

    create, arrived = checkpoints._create, threading.Event()
    name = "hf-hub:somebody/slow"

    def slow(asked: str, source: str) -> Any:
        if asked != name:
            return create(asked, source)
        assert arrived.wait(60)
        return timm.create_model("test_resnet").eval(), SOFTMAX

    monkeypatch.setattr(checkpoints, "_create", slow)
    monkeypatch.setattr(checkpoints, "_checked", lambda name: name)  # which asks the Hub
    linked = chromium.new_context(viewport=DESKTOP).new_page()
    linked.goto(f"{page}?checkpoint={name}&picture=astronaut")
    expect(linked.locator("#picture")).to_contain_text("It is downloaded only if you say so", timeout=20_000)
    expect(linked.get_by_role("button", name="Copy link")).to_be_disabled()
    linked.get_by_label("A cat, from").check()  # an example downloads nothing
    expect_shown(linked, LITE0, "chelsea", "Egyptian cat")
    linked.get_by_role("button", name=f"Download {name} and show it").click()
    typed = open_page(chromium, page)
    choose(typed, name)
    other = open_page(chromium, page)
    other.get_by_label("An astronaut, from").check()
    expect_shown(other, LITE0, "astronaut", "bobsled")
    arrived.set()
    for tab in (linked, typed):
        expect(tab.locator("#head")).to_contain_text(f"{name}: 1,000 classes", timeout=30_000)
        expect(tab.locator("#model input")).to_have_value(name)
    expect(linked.get_by_role("button", name="Download")).to_have_count(0)
    for tab in (linked, typed, other):
        tab.close()
    checkpoints._load.cache_clear()
    checkpoints._here.discard(name)


def test_every_way_to_change_lam_is_followed(page: str, chromium: Any) -> None:
    from playwright.sync_api import expect

    tab = open_page(chromium, page)
    first, field = tab.locator("#logits .logit").first, tab.locator("#lam-logits input[type=number]")
    usual = first.inner_text()
    shown = {}
    for typed, value in (("0.5", "0.5"), ("99", "1"), ("-5", "0")):
        before = first.inner_text()
        field.fill(typed)
        field.press("Enter")
        expect(field).to_have_value(value)
        expect(first).not_to_have_text(before)
        shown[value] = float(first.inner_text())
    assert shown["0"] < float(usual) < shown["0.5"] < shown["1"]
    tab.locator("#lam-logits").get_by_role("button", name="Reset").click()
    expect(first).to_have_text(usual)
    expect(tab).to_have_url(re.compile("lam_logits=0.1&"))
    expect(tab.locator(".toast-body")).to_have_count(0)
    tab.close()


def test_the_keyboard_reaches_and_shows_every_control(page: str, chromium: Any) -> None:
    from playwright.sync_api import expect

    tab = open_page(chromium, page)
    status = tab.locator("#spoken [role=status]")
    expect(status).to_have_text(
        "First tags: plain espresso; logits espresso; log_softmax espresso. Map of espresso, per-location logits."
    )
    tab.locator("#examples input").first.focus()
    tab.keyboard.press("ArrowDown")
    expect_shown(tab, LITE0, "chelsea", "Egyptian cat")
    expect(status).to_contain_text("First tags: plain Egyptian cat")
    outline = "element => getComputedStyle(element).outlineStyle"
    assert tab.locator("#examples label", has=tab.locator(":checked")).evaluate(outline) == "solid"
    slider = tab.locator("#lam-logits input[type=range]")
    slider.focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#lam-logits input[type=number]")).to_have_value("0.11")
    assert slider.evaluate(outline) == "solid"
    tab.close()


def test_finite_t_is_in_sight_and_infinite_t_has_no_slider(page: str, chromium: Any) -> None:
    from playwright.sync_api import expect

    tab = open_page(chromium, f"{page}?T=5")
    number = tab.locator("#temperature input[type=number]")
    expect(number).to_have_value("5")
    expect(number).to_be_enabled()
    tab.get_by_label("T = infinity: the spatial maximum").check()
    expect(number).to_be_disabled()
    tab.close()


@pytest.mark.parametrize(
    "size", [(1270, 900), (1050, 900), (1000, 900), (768, 900), (740, 360)], ids=lambda size: f"{size[0]}px"
)
def test_three_lists_side_by_side_and_the_picture_in_sight(page: str, chromium: Any, size: tuple[int, int]) -> None:
    from playwright.sync_api import expect

    tab = open_page(chromium, page, viewport=dict(zip(("width", "height"), size, strict=True)))
    assert tab.evaluate("document.documentElement.scrollWidth") == size[0]
    boxes = [tab.locator(f"#{column} ol").bounding_box() for column in ("plain", "logits", "log_softmax")]
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"] and abs(boxes[0]["y"] - boxes[2]["y"]) < 30
    tag = tab.locator("#log_softmax button.tag").nth(2)
    tag.click()
    expect(tag).to_have_attribute("aria-pressed", "true")
    image, pressed = tab.locator("#picture img").bounding_box(), tag.bounding_box()
    assert 0 <= image["y"] < image["y"] + image["height"] <= pressed["y"] < size[1]
    tab.locator("#log_softmax button.tag").last.scroll_into_view_if_needed()
    tab.mouse.wheel(0, 100)
    tab.wait_for_timeout(300)
    picture = tab.locator("#picture").bounding_box()
    assert picture["y"] >= 0 and picture["height"] <= size[1] / 2
    tab.close()
