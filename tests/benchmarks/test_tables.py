"""What a sweep prints: nothing is lost, on a narrow terminal either."""

import io

import pytest
from rich.console import Console

from benchmarks.reporting.tables import print_records

RESULT = {
    "metric": "mAP",
    "scores": "logits",
    "lam": "0.1",
    "temperature": "inf",
    "baseline": 50.0,
    "value": 51.25,
    "gain": 1.25,
}
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
            RESULT | {"protocol": "fixed_log_softmax", "gain": 2.75, "ci_low": 1.5, "ci_high": 4.0},
            RESULT | {"protocol": "log_softmax_vs_logits", "gain": 1.5, "ci_low": 0.25, "ci_high": 2.5},
            RESULT
            | {"protocol": "crossfit", "gain": -3.5, "ci_low": -4.0, "ci_high": -3.0, "lam": "0.2;1"}
            | {"scores": "log_softmax;log_softmax", "temperature": "5;5"},
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
    text = " ".join(out.getvalue().split())
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
        "log_softmax lam 0.2;1",
        "+2.75",
        "+1.50",
        "max_pool",
        "+7.75",
    ):
        assert expected in text, expected
    assert "+99.00" not in text
    assert "…" not in out.getvalue()
    assert "failed: resnet50.a1_in1k on photos, single, 224x320 px: OSError: [Errno 28] no space" in text
    assert "fixed: the paper's, logits, lam 0.1, T inf. fixed_log_softmax: lam 0.3, T inf." in text
    assert "best: chosen on the test data itself, optimistic. Other columns: the plain model otherwise pooled." in text


def of_the_sample(model: str, metric: str) -> dict:
    best = RESULT | {"metric": metric, "protocol": "best", "gain": 12.34, "ci_low": None, "ci_high": None}
    best |= {"scores": "log_softmax", "lam": "0.05"}
    protocols = ("fixed", "fixed_log_softmax", "log_softmax_vs_logits", "max_pool", "test_time_pool")
    others = [best | {"protocol": name, "gain": -12.34} for name in protocols]
    about = {"data": "sample", "task": "mosaic", "grid": 2, "img_size": 224, "status": "ok", "n": 35}
    return about | {"model": model, "results": [best, *others]}


def test_the_sample_fits_into_120_columns() -> None:
    records = [of_the_sample(f"pypi:tf_efficientnet_lite{i}", "recall_at_k") for i in range(3)]
    out = io.StringIO()
    print_records(records, Console(file=out, width=120))
    title, *lines = out.getvalue().splitlines()
    assert title.strip() == "sample, mosaic 2x2, n = 35"  # what all have in common is said once
    header = next(i for i, line in enumerate(lines) if line.startswith("model"))
    assert "crossfit" not in " ".join(lines[: header + 1])  # nobody has one
    rows = [line for line in lines if line.startswith("tf_efficientnet_lite")]
    assert len(rows) == 3 and all(line.count("-12.34") == 5 for line in rows)
    assert sum("log_softmax lam 0.05 T inf" in line for line in lines) == 3
    assert max(map(len, lines[: header + 7])) <= 120
