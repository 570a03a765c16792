"""The documentation site: built without the network, complete, and loading nothing from elsewhere."""

import re
import socket
from collections import Counter
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

import pytest

import timm_csra
from tests.accessibility import violations

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
LOADING = dict.fromkeys(("script", "img", "source", "iframe", "video", "audio", "embed"), "src") | {"link": "href"}
MATERIALS = ("aria-dialog-name",)  # the theme's search box is a dialog without a name: not ours to mend
COUNTED = {"table", "li", "pre", "img", "h1", "h2", "h3", "blockquote"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as CI does, where a connection to any host is an error."""

    def refuse(*address: Any) -> NoReturn:
        raise AssertionError(f"the documentation is built without the network, found a connection to {address[1:]}")

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


class _Page(HTMLParser):
    """What a page links to, what it loads, its anchors, and the elements of its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.elements: Counter[str] = Counter()
        self._article = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get(LOADING.get(tag, "")) and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values[LOADING[tag]])
        self._article += tag == "article"
        if self._article:
            self.elements[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self._article -= tag == "article"


@cache
def page(file: Path) -> _Page:
    return _Page(file.read_text(encoding="utf-8"))


def is_outside(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def broken_links(site: Path) -> list[str]:
    """Links within the site whose file or anchor it lacks."""
    broken = []
    for file in sorted(site.rglob("*.html")):
        for link in page(file).links + page(file).loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or file.name == "404.html":  # that one has absolute links
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in page(target).anchors
            ):
                broken.append(f"{file.relative_to(site)}: {link}")
    return broken


def test_links_and_anchors_of_the_site_resolve(site: Path) -> None:
    assert broken_links(site) == []


def test_what_is_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="here"><a href="#here"></a><a href="#there"></a><a href="b/"></a>')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<a href="../a.html#here"></a><a href="../c.html"></a><img src="d.png">')
    assert broken_links(tmp_path) == ["a.html: #there", "b/index.html: ../c.html", "b/index.html: d.png"]


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    loaded = {load for file in site.rglob("*.html") for load in page(file).loads}
    in_styles = {
        address
        for file in site.rglob("*.css")
        for address in re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", file.read_text(encoding="utf-8"))
    }
    assert loaded and not [address for address in loaded | in_styles if is_outside(address)]


def test_records_are_not_part_of_the_site(site: Path) -> None:
    assert not list(site.rglob("*.jsonl"))
    assert sum(file.stat().st_size for file in site.rglob("*")) < 20e6


@pytest.mark.parametrize("name", PAGES)
def test_pages_read_alike_on_github_and_on_the_site(site: Path, name: str) -> None:
    """Python-Markdown wants more blank lines and deeper indents than CommonMark: without them lists become text."""
    if name == "api":
        pytest.skip("made of docstrings")
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    github = _Page(f"<article>{MarkdownIt('commonmark').enable('table').render(text)}</article>").elements
    built = page(site / "index.html" if name == "index" else site / name / "index.html").elements
    assert {tag: built[tag] for tag in COUNTED} == {tag: github[tag] for tag in COUNTED}


def test_the_reference_has_every_public_name(site: Path) -> None:
    documented = {anchor for anchor in page(site / "api" / "index.html").anchors if anchor.startswith("timm_csra.")}
    assert {f"timm_csra.{name}" for name in timm_csra.__all__} <= documented


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_finds_what_it_searches_for_and_asks_no_other_host(site: Path, chromium: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    home, asked = f"http://127.0.0.1:{server.server_port}/", []
    tab = chromium.new_page()
    tab.on("request", lambda request: asked.append(request.url))
    for file in sorted(site.rglob("*.html")):
        tab.goto(home + file.relative_to(site).as_posix())
    tab.goto(home)
    tab.keyboard.press("/")
    tab.keyboard.type("reshape_transform")
    tab.locator(".md-search-result__item", has_text="Questions").wait_for(timeout=10_000)
    tab.close()
    server.shutdown()
    assert [address for address in asked if not address.startswith(home)] == []


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["", "choosing/", "results/", "api/"])
def test_anybody_can_read_it(site: Path, chromium: Any, axe: str, name: str, scheme: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    tab = chromium.new_context(color_scheme=scheme).new_page()
    tab.goto(f"http://127.0.0.1:{server.server_port}/{name}")
    found = violations(tab, axe, MATERIALS)
    tab.close()
    server.shutdown()
    assert found == []
