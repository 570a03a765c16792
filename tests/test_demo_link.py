"""What the page to try it reads in a link, and writes."""

import math
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gradio", reason="the extra `demo` is not installed: nothing here says whether the page works")
from timm_csra.config import LOGITS, SCORES
from timm_csra.demo.link import Link, read_link


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
        ({"T": "1_0"}, "The link has T='1_0'"),
    ],
)
def test_what_makes_no_sense_in_a_link_is_told(query: dict[str, str], text: str) -> None:
    link, (fault,) = read_link(query, ["coffee"])
    assert text in fault
    assert link == Link(chosen=(3, LOGITS) if query.get("class") == "3" else None)


def test_nothing_in_a_link_is_the_usual_value() -> None:
    assert read_link(dict.fromkeys(("lam_logits", "T", "picture", "class", "scores"), " "), ["coffee"]) == (Link(), [])
    assert "lam_logits=0&" in read_link({"lam_logits": "-0"}, ())[0].query()


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
    read, faults = read_link(dict(parse_qsl(link.query(), strict_parsing=True)), ["coffee"])
    assert faults == []
    assert read.log_softmax == pytest.approx(link.log_softmax)
    assert read == Link(**(vars(link) | {"log_softmax": read.log_softmax}))
