"""What a sweep prints: nothing is lost, on a narrow terminal either."""

import io

import pytest
from rich.console import Console

from benchmarks.tables import print_records

RESULT = {"metric": "mAP", "lam": "0.1", "temperature": "inf", "baseline": 50.0, "value": 51.25, "gain": 1.25}
RECORDS = [
    {
        "model": "local-dir:/some/where/mine",
        "data": "photos",
        "task": "mosaic",
        "img_size": 224,
        "status": "ok",
        "n": 125,
        "results": [
            RESULT | {"protocol": "fixed", "ci_low": 0.5, "ci_high": 2.0},
            RESULT | {"protocol": "crossfit", "gain": -3.5, "ci_low": -4.0, "ci_high": -3.0, "lam": "0.2;1"},
            RESULT | {"protocol": "best", "gain": None, "ci_low": None, "ci_high": None},
            RESULT
            | {"protocol": "max_pool", "gain": 7.75, "ci_low": 6.5, "ci_high": 9.0, "lam": "", "temperature": ""},
            RESULT | {"protocol": "curve", "gain": 99.0, "ci_low": 98.0, "ci_high": 100.0},
        ],
    },
    {
        "model": "resnet50.a1_in1k",
        "data": "photos",
        "task": "single",
        "img_size": "224x320",
        "status": "failed",
        "reason": "OSError: [Errno 28] no space",
        "results": [],
    },
]


@pytest.mark.parametrize("width", [80, 200])
def test_every_number_is_printed(width: int) -> None:
    out = io.StringIO()
    print_records(RECORDS, Console(file=out, width=width))
    words = out.getvalue().split()
    for expected in (
        "mine",
        "mosaic",
        "224",
        "mAP",
        "125",
        "50.00",
        "+1.25",
        "[+0.50,",
        "+2.00]",
        "-3.50",
        "0.2;1",
        "max_pool",
        "+7.75",
        "-",
    ):
        assert expected in words, expected
    assert "+99.00" not in words
    assert "…" not in out.getvalue()
    text = " ".join(words)
    assert "failed: resnet50.a1_in1k on photos, single, 224x320 px: OSError: [Errno 28] no space" in text
    assert "best: chosen on the test data itself, optimistic. Other columns: the plain model otherwise pooled." in text
