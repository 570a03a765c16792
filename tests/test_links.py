"""Links of the documents to each other and to files of the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=\"([^\"]+)\"")


def links(text: str) -> list[str]:
    """Targets within the repository, as they are written."""
    every = (inline or tag for inline, tag in LINK.findall(CODE.sub("", text)))
    return [link for link in every if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """Of the headings, by GitHub's rule: in lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ +(.+?) *#*$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(document: Path) -> list[str]:
    """Links whose file or heading does not exist."""
    found = []
    for link in links(document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_resolve(document: Path) -> None:
    assert broken(document) == []


def test_what_is_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# The `code`, and all else\n```\n# no heading\n```\n")
    document = tmp_path / "document.md"
    document.write_text(
        "# Here\n[a](other.md) [b](other.md#the-code-and-all-else) [c](#here) [d](https://example.org/gone)\n"
        '`[e](in-code)` [f](gone.md) [g](other.md#no-heading) [h](#there)\n![i](gone.png) <img src="gone.jpg">\n'
    )
    assert broken(document) == ["gone.md", "other.md#no-heading", "#there", "gone.png", "gone.jpg"]
