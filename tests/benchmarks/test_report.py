"""The report: its figures against the records, and the page in a real browser, small and with 1,000 checkpoints."""

import csv
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.records.files import write_record
from benchmarks.report import main
from benchmarks.reporting.summary import headline, write_summary
from tests.accessibility import Requests, violations

SCREENSHOTS = Path(os.environ.get("TIMM_CSRA_SCREENSHOTS", "screenshots"))
TASKS = (("single", None, ("top1", "top5")), ("mosaic", 2, ("mAP", "lrap")), ("mosaic", 3, ("mAP", "lrap")), ("real", None, ("top1", "lrap")), ("multilabel", None, ("mAP", "lrap")))  # fmt: skip
LAMS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def synthetic(folder: Path, checkpoints: int, sizes: int = 1) -> dict[str, float]:
    """Records as a sweep writes them, with made-up figures; the gain of `fixed` by checkpoint, for mosaics 2x2."""
    rng = np.random.default_rng(0)
    gains = {}
    for number in range(checkpoints):
        model = f"checkpoint{number:04d}.tag"
        for size in range(sizes):
            for task, grid, metrics in TASKS:
                results = []
                for metric in metrics:
                    base, gain, error = rng.uniform(30, 90), rng.normal(1, 2), rng.uniform(0.2, 1.5)
                    other = gain + rng.normal(0.5, 1)
                    figures = {  # scores, lam, gain, and what it is a gain over
                        "fixed": ("logits", 0.1, gain, base), "fixed_log_softmax": ("log_softmax", 0.3, other, base),
                        "log_softmax_vs_logits": ("log_softmax", 0.3, other - gain, base + gain),
                        "crossfit": ("logits;log_softmax", 0.1, gain, base), "best": ("logits", 0.1, gain, base),
                    }  # fmt: skip
                    rows = [*figures.items()]
                    rows += [("curve", (kind, lam, share * lam / 0.1, base)) for kind, share in (("logits", gain), ("log_softmax", other)) for lam in LAMS]  # fmt: skip
                    for protocol, (kind, lam, own, before) in rows:
                        results.append(
                            {
                                "metric": metric, "protocol": protocol, "scores": kind, "lam": f"{lam:g}", "temperature": "inf",
                                "baseline": before, "value": before + own, "gain": own,
                                "ci_low": None if protocol == "best" else own - 2 * error,
                                "ci_high": None if protocol == "best" else own + 2 * error,
                                "p_value": None if protocol in ("best", "curve") else float(np.exp(-((own / error) ** 2))),
                                "test": "paired t",
                            }
                        )  # fmt: skip
                    if (task, grid, metric, size) == ("mosaic", 2, "mAP", 0):
                        gains[model] = gain
                pixels = 224 * (1 + size)
                key = {
                    "model": model,
                    "data": "photos",
                    "task": task,
                    "img_size": pixels,
                    "grid": grid,
                    "settings": [[0, "inf"]],
                    "seed": 0,
                    "amp": "none",
                }
                record = {
                    **key, "n": 500, "columns": 1000, "kind": "exact", "macs": int(rng.uniform(1e8, 1e10)), "status": "ok", "reason": None,
                    "requested": f"{1 + size}x", "results": results, "key": key, "seconds": 1.0,
                    "environment": {"device": "cpu", "platform": "Linux", "python": "3.11", "commit": "c0ffee", "packages": {"torch": "2.14"}},
                }  # fmt: skip
                path = folder / "records" / f"{model}--{task}{grid or ''}--{pixels}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record))
    failed = {
        **record,
        "model": "broken",
        "key": {**key, "model": "broken"},
        "status": "failed",
        "reason": "ValueError: <b>weights</b> do not fit",
        "results": [],
    }
    write_record(folder / "records" / "broken.json", failed)
    return gains


def test_tables_say_what_the_records_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gains = synthetic(tmp_path, 6)
    assert main([str(tmp_path)]) == 0
    report = tmp_path / "report"
    rows = list(csv.DictReader((report / "results.csv").open()))
    assert list(rows[0])[:9] == [
        "model",
        "img_size",
        "top1",
        "top1_err",
        "top5",
        "top5_err",
        "param_count",
        "crop_pct",
        "interpolation",
    ]
    mosaics = {row["model"]: row for row in rows if (row["task"], row["metric"]) == ("mosaic 2x2", "mAP")}
    assert {model: float(row["gain_fixed"]) for model, row in mosaics.items()} == pytest.approx(gains, abs=1e-4)
    versus = {model: float(row["gain_log_softmax_vs_logits"]) for model, row in mosaics.items()}
    gained = {model: float(row["gain_fixed_log_softmax"]) for model, row in mosaics.items()}
    assert {model: gained[model] - gains[model] for model in gains} == pytest.approx(versus, abs=1e-3)
    single = next(row for row in rows if row["task"] == "single")
    assert float(single["top1"]) + float(single["top1_err"]) == pytest.approx(100, abs=1e-3)
    text = (report / "results.md").read_text()
    assert text.count("| checkpoint0000.tag |") == 10
    assert "- 1 cells, failed: ValueError: <b>weights</b> do not fit" in text
    assert "| lam = 0 | fixed | fixed_log_softmax | log_softmax_vs_logits | crossfit |" in text
    said = re.search(
        r"- photos, mosaic 2x2, 1x, mAP: log_softmax better than logits on (\d) checkpoints, worse on (\d)", text
    )
    assert said is not None
    assert int(said[1]) <= sum(gain > 0 for gain in versus.values())
    assert int(said[2]) <= sum(gain < 0 for gain in versus.values())
    for kind in ("png", "svg"):
        plots = sorted(path.name for path in (report / "plots").glob(f"*.{kind}"))
        assert len(plots) == 5 * (4 + 3 + 1)
        assert all((report / "plots" / name).stat().st_size > 3000 for name in plots)
    page = (report / "index.html").read_text()
    assert "src=" not in page.split("<script>")[0]
    assert "<b>weights</b>" not in page.split('id="data"')[0]


def test_records_of_before_there_were_two_kinds_of_scores(tmp_path: Path) -> None:
    synthetic(tmp_path, 3)
    for path in (tmp_path / "records").glob("*.json"):
        record = json.loads(path.read_text())
        kept = [result for result in record["results"] if "log_softmax" not in result["protocol"] + result["scores"]]
        record["results"] = [{name: value for name, value in result.items() if name != "scores"} for result in kept]
        path.write_text(json.dumps(record))
    assert main([str(tmp_path), "--no-plots"]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    data = json.loads(page.split('id="data" type="application/json">')[1].split("</script>")[0])
    at = data["fields"].index("scores")
    assert {data["names"][row[at]] for row in data["rows"]} == {"logits"}
    assert {data["names"][curve[3]] for curve in data["curves"]} == {"logits"}
    row = next(csv.DictReader((tmp_path / "report" / "results.csv").open()))
    assert row["gain_fixed"] and not row["gain_fixed_log_softmax"]


def test_a_metric_that_is_left_out_says_why(tmp_path: Path) -> None:
    synthetic(tmp_path, 2)
    left = {"metric": "CF1", "scores": "log_softmax", "reason": "compares each logit with 0"}
    for path in (tmp_path / "records").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"left_out": [left]}))
    assert main([str(tmp_path), "--no-plots"]) == 0
    for name in ("results.md", "index.html"):
        told = "CF1 is left out for log_softmax: it compares each logit with 0."
        assert (tmp_path / "report" / name).read_text().count(told) == 1


def test_what_was_not_tested_is_drawn_too(tmp_path: Path) -> None:
    synthetic(tmp_path, 3)
    for path in (tmp_path / "records").glob("*.json"):
        record = json.loads(path.read_text())
        record["results"] = [
            result | {"p_value": None, "ci_low": None, "ci_high": None} for result in record["results"]
        ]
        path.write_text(json.dumps(record))
    assert main([str(tmp_path)]) == 0
    plot = next((tmp_path / "report" / "plots").glob("forest-*mosaic_2x2*.svg")).read_text()
    assert plot.lower().count('fill="#5b8fc9"') >= 3


PUBLISHED = """model,top1,img_size,crop_pct,interpolation
checkpoint0000.tag,{:.3f},224,0.875,bicubic
checkpoint0001.tag,{:.3f},224,0.875,bicubic
"""


def test_flagged_checkpoints_are_counted_as_in_the_summary(tmp_path: Path) -> None:
    """One agrees with its published figure, one does not."""
    synthetic(tmp_path, 4)
    baselines = []
    for path in sorted((tmp_path / "records").glob("checkpoint*--single--224.json")):
        record = json.loads(path.read_text())
        for result in record["results"]:
            result |= {"gain": 5.0, "p_value": 1e-9} if result["p_value"] is not None else {}
        baselines.append(next(r["baseline"] for r in record["results"] if r["metric"] == "top1"))
        preprocessing = {"crop_pct": 0.875, "interpolation": "bicubic"}
        path.write_text(json.dumps(record | {"n": 50_000, "preprocessing": preprocessing}))
    (tmp_path / "expected.csv").write_text(PUBLISHED.format(baselines[0] + 3, baselines[1]))
    rows = write_summary(tmp_path)[1].rows
    counts = headline(rows)
    found = counts["photos", "single", "None", "1x", "top1", "fixed"]
    assert found == {"better": 3, "flagged": 1}
    assert main([str(tmp_path), "--no-plots"]) == 0
    report = tmp_path / "report"
    text = (report / "results.md").read_text()
    assert "| photos, single, 1x | top1 | fixed | 3 | 0 | 0 | 1 |" in text
    assert "| photos, mosaic 2x2, 1x | mAP | fixed |" in text
    assert text.count("- flagged, and left out of these counts: checkpoint0000.tag, whose top-1 at lam = 0") == 1
    data = json.loads(
        (report / "index.html").read_text().split('id="data" type="application/json">')[1].split("</script>")[0]
    )
    shown = {(group, metric, protocol): counts for group, metric, protocol, counts in data["headline"]}
    assert shown["photos · single · 1x", "top1", "fixed"] == found
    # The counts above the page's table are made of the rows.
    mine = [dict(zip(data["fields"], row, strict=True)) for row in data["rows"]]
    name = data["names"].index
    chosen = [
        row
        for row in mine
        if row["group"] == name("photos · single · 1x")
        and row["metric"] == name("top1")
        and row["protocol"] == name("fixed")
    ]
    assert Counter(data["names"][row["verdict"]] for row in chosen) == found
    assert "flagged" in data["verdicts"]
    checks = {
        row["model"]: row["baseline_check"]
        for row in csv.DictReader((report / "results.csv").open())
        if row["task"] == "single"
    }
    assert (checks["checkpoint0000.tag"], checks["checkpoint0001.tag"]) == ("flagged", "agrees")
    assert checks["checkpoint0002.tag"] == "not compared: no published figure"


def test_published_figures_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic(tmp_path, 1)
    (tmp_path / "expected.csv").write_text("model,acc\na,1\n")
    assert main([str(tmp_path), "--no-plots"]) == 2
    said = capsys.readouterr().err
    assert "expected.csv: found no column top1, img_size, crop_pct, interpolation; expected timm's results" in said


def test_n_is_that_of_the_metric(tmp_path: Path) -> None:
    synthetic(tmp_path, 1)
    for path in (tmp_path / "records").glob("*--real--224.json"):
        record = json.loads(path.read_text())
        for result in record["results"]:
            result["n"] = {"top1": 498, "lrap": 44}[result["metric"]]
        path.write_text(json.dumps(record))
    assert main([str(tmp_path), "--no-plots"]) == 0
    report = tmp_path / "report"
    text = (report / "results.md").read_text()
    assert "| checkpoint0000.tag | photos · real · 1x | 224 | top1 | 498 |" in text
    assert "| checkpoint0000.tag | photos · real · 1x | 224 | lrap | 44 |" in text
    assert "| checkpoint0000.tag | photos · multilabel · 1x | 224 | lrap | - |" in text  # an old record: not known
    assert "n: images that count for the metric" in text
    rows = {(row["task"], row["metric"]): row["n"] for row in csv.DictReader((report / "results.csv").open())}
    assert (rows["real", "lrap"], rows["real", "top1"], rows["single", "top1"]) == ("44", "498", "500")
    page = (report / "index.html").read_text()
    assert "<dt>n</dt><dd>the images that count for the metric" in page
    data = json.loads(page.split('id="data" type="application/json">')[1].split("</script>")[0])
    real, lrap = data["names"].index("photos · real · 1x"), data["names"].index("lrap")
    assert {row[5] for row in data["rows"] if (row[1], row[2]) == (real, lrap)} == {44}


def test_a_cut_record_does_not_end_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic(tmp_path, 3)
    cut = tmp_path / "records" / "checkpoint0001.tag--real--224.json"
    cut.write_text(cut.read_text()[:1000])
    for path in (tmp_path / "records").glob("*mosaic2*.json"):  # old: they do not say with what they were measured
        record = json.loads(path.read_text())
        del record["environment"], record["requested"]
        record["key"] = {"model": record["model"]}
        path.write_text(json.dumps(record))
    assert main([str(tmp_path), "--no-plots"]) == 0
    told = capsys.readouterr()
    assert [line.split(": found")[0] for line in told.err.splitlines()] == [str(cut)]
    assert "15 records" in told.out
    text = (tmp_path / "report" / "results.md").read_text()
    assert text.count("| photos · real · 1x | 224 | top1 |") == 2


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "expected the --out folder of a sweep" in capsys.readouterr().err


def page_of(folder: Path, checkpoints: int) -> Path:
    """Write the page of a run with so many checkpoints."""
    synthetic(folder, checkpoints)
    assert main([str(folder), "--no-plots"]) == 0
    return folder / "report" / "index.html"


@pytest.mark.browser
@pytest.mark.slow
def test_a_person_reads_it(tmp_path: Path, chromium) -> None:
    from playwright.sync_api import expect

    gains = synthetic(tmp_path, 60, sizes=2)
    assert main([str(tmp_path), "--no-plots"]) == 0
    tab = chromium.new_page(viewport={"width": 1200, "height": 1000})
    asked, errors = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto((tmp_path / "report" / "index.html").as_uri())
    expect(tab.locator("body[data-ready=yes]")).to_be_attached(timeout=20_000)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []

    tab.get_by_label("data · task · size").select_option("photos · mosaic 2x2 · 1x")
    assert tab.get_by_label("metric").input_value() == "mAP"
    rows = tab.locator("#table tbody tr")
    ranked = sorted(gains, key=lambda model: -gains[model])
    expect(rows).to_have_count(25)
    expect(rows.first).to_contain_text(ranked[0])  # the largest gain first
    expect(rows.first.locator("td").nth(4)).to_have_text(f"{gains[ranked[0]]:+.2f}")
    counts = tab.locator("#counts").inner_text()
    assert counts.startswith("60 checkpoints: ")

    header = tab.get_by_role("button", name="gain", exact=True)
    header.focus()
    tab.keyboard.press("Enter")  # by keyboard: the other way round
    expect(rows.first).to_contain_text(ranked[-1])
    tab.get_by_role("button", name="Next").click()
    expect(rows.first).to_contain_text(ranked[-26])
    tab.get_by_label("model", exact=True).fill("0042")
    expect(rows).to_have_count(1)
    tab.get_by_label("model", exact=True).fill("no such model")
    expect(rows).to_have_text(["No checkpoint matches."])
    tab.get_by_label("model", exact=True).fill("0042")
    button = tab.get_by_role("button", name="show the curve of checkpoint0042.tag")
    button.focus()
    tab.keyboard.press("Enter")
    expect(button).to_be_focused()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(tab.locator("#curve-shown")).to_have_text("The curves of checkpoint0042.tag are drawn above.")
    expect(rows.first).to_have_attribute("aria-selected", "true")
    shown = tab.evaluate("views.curve.data('curves').map(row => row.who)")
    assert {"checkpoint0042.tag, logits, 95 %", "checkpoint0042.tag, log_softmax, 95 %"} <= set(shown)
    assert {"logits: median, 80 % of shown", "log_softmax: median, 80 % of shown"} <= set(shown)
    assert tab.evaluate("views.forest.data('rows').length") == 1  # the plots follow the table
    assert tab.evaluate("views.size.data('sizes').length") == 2
    tab.get_by_label("model", exact=True).fill("")
    tab.get_by_label("verdict").select_option("better")
    better = int(counts.split(": ")[1].split(" better")[0])
    assert tab.evaluate("shown.length") == better
    tab.get_by_label("verdict").select_option("")
    tab.get_by_label("protocol").select_option("log_softmax_vs_logits")
    expect(tab.locator("#counts")).to_contain_text("log_softmax over logits: 60 checkpoints: ")
    expect(rows.first).to_contain_text("log_softmax")
    expect(tab.locator("#headline")).to_contain_text("log_softmax_vs_logits")
    verdicts = tab.locator("#headline tbody tr")
    of_all = set(tab.evaluate("data.headline.map(([group]) => group)"))
    assert len(of_all) > 1 and {row.locator("td").first.inner_text() for row in verdicts.all()} == {
        "photos · mosaic 2x2 · 1x"
    }
    tab.get_by_label("The next two tables for all data").check()
    assert {row.locator("td").first.inner_text() for row in verdicts.all()} == of_all
    expect(tab.locator("#failures")).to_contain_text("1 cells, failed: ValueError: <b>weights</b> do not fit")
    expect(tab.locator("#measured")).to_contain_text("c0ffee")
    SCREENSHOTS.mkdir(exist_ok=True, parents=True)
    tab.screenshot(path=SCREENSHOTS / "report.png", full_page=True)

    tab.emulate_media(color_scheme="dark")
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 23, 27)"
    tab.wait_for_timeout(500)
    tab.screenshot(path=SCREENSHOTS / "report-dark.png")
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.reload()
    expect(tab.locator("body[data-ready=yes]")).to_be_attached(timeout=20_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390, "a phone has to scroll sideways"
    assert tab.evaluate(
        "[...document.querySelectorAll('figure canvas')].every(c => c.clientHeight > 100 && c.clientWidth <= 390)"
    )
    tab.screenshot(path=SCREENSHOTS / "report-phone.png", full_page=True)

    def selection() -> list[str]:
        return [tab.locator(f"#{id}").input_value() for id in ("group", "metric", "protocol", "verdict", "search")]

    kept = ["photos · mosaic 2x2 · 1x", "mAP", "log_softmax_vs_logits", "", ""]
    assert selection() == kept  # after the reload
    expect(tab.locator("#curve-shown")).to_contain_text("checkpoint0042.tag")
    expect(tab.locator("#table th[aria-sort=ascending]")).to_have_text("gain")
    tab.evaluate("location.hash = 'protocol=fixed&search=0042&sort=-n&page=x'")  # a link sent by somebody
    expect(rows).to_have_count(1)
    assert selection() == [*kept[:2], "fixed", "", "0042"]
    tab.evaluate("location.hash = 'group=<b>&metric=no&sort=%26&page=-3&model=nobody'")
    expect(tab.locator("#curve-shown")).to_have_text("")
    assert selection() == [*kept[:2], "fixed", "", ""]  # what does not exist changes nothing
    expect(tab.locator("#absent")).to_have_text(
        "The link names what this report does not have, or not for this data: <b>, no, nobody."
    )
    tab.get_by_label("model", exact=True).fill("0042")
    expect(tab.locator("#absent")).to_have_text("")
    assert errors == []
    tab.close()


@pytest.mark.browser
@pytest.mark.slow
def test_a_link_shows_the_same_to_everybody(tmp_path: Path, chromium) -> None:
    """In a new tab, in one that has filters of its own, after going back, and in a frame of another page."""
    from playwright.sync_api import expect

    page = page_of(tmp_path, 3)
    tab, errors = chromium.new_page(), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.as_uri())
    rows = tab.locator("#table tbody tr")
    tab.wait_for_function("location.hash.includes('sort=-gain')")
    link = tab.evaluate("location.hash")
    tab.get_by_role("button", name="show the curve of checkpoint0001.tag").click()
    tab.get_by_label("model", exact=True).fill("0002")
    expect(tab.locator("#curve-shown")).to_have_text("")  # no row of the table, so no curve
    expect(rows).to_have_count(1)
    tab.get_by_label("verdict").select_option("not tested")
    tab.wait_for_function("location.hash.includes('verdict')")
    tab.evaluate(f"location.hash = {link!r}")
    expect(rows).to_have_count(3)
    assert tab.get_by_label("verdict").input_value() == ""

    tab.get_by_label("The next two tables for all data").check()
    tab.wait_for_function("location.hash.includes('everything')")
    count = tab.locator("#headline tbody tr").count()
    tab.goto("about:blank")
    tab.go_back()
    expect(tab.get_by_label("The next two tables for all data")).to_be_checked()
    expect(tab.locator("#headline tbody tr")).to_have_count(count)
    tab.evaluate(f"location.hash = {link!r}")
    expect(tab.get_by_label("The next two tables for all data")).not_to_be_checked()
    assert tab.locator("#headline tbody tr").count() < count

    tab.goto("about:blank")
    tab.set_content("<iframe sandbox=allow-scripts></iframe>")
    tab.evaluate("page => { document.querySelector('iframe').srcdoc = page; }", page.read_text())
    expect(tab.frame_locator("iframe").locator("#table tbody tr")).to_have_count(3)
    tab.wait_for_timeout(500)  # the address is written after a pause
    assert errors == []
    tab.close()


@pytest.mark.browser
@pytest.mark.slow
def test_a_key_that_is_held_writes_the_address_once(tmp_path: Path, chromium) -> None:
    """Safari and Firefox raise an error at more than 10 or 20 changes of the address a second."""
    tab = chromium.new_page()
    tab.goto(page_of(tmp_path, 1).as_uri())
    tab.wait_for_function("location.hash.includes('sort=-gain')")
    tab.evaluate("history.replaceState = (state, title, url) => { written.push(url); }; window.written = []")
    tab.evaluate("for (let i = 0; i < 50; i++) { by('search').value += 'a'; by('search').oninput(); }")
    tab.wait_for_function("written.length > 0")
    assert tab.evaluate("written.length") == 1 and "a" * 50 in tab.evaluate("written[0]")
    tab.close()


@pytest.mark.browser
@pytest.mark.slow
def test_anybody_can_read_it(tmp_path: Path, chromium, axe: str) -> None:
    page = page_of(tmp_path, 30)
    for options in ({}, {"color_scheme": "dark"}, {"viewport": {"width": 360, "height": 740}}):
        tab = chromium.new_context(**options).new_page()
        asked = Requests(tab)
        tab.goto(page.as_uri())
        tab.locator("body[data-ready=yes]").wait_for(timeout=20_000)
        tab.get_by_text("Protocols and terms").click()
        assert tab.get_by_label("data · task · size").input_value().endswith(" 1x")
        assert violations(tab, axe) == [] and asked.outside("file:") == []
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.close()


@pytest.mark.browser
@pytest.mark.slow
def test_a_thousand_checkpoints_stay_quick(tmp_path: Path, chromium) -> None:
    from playwright.sync_api import expect

    synthetic(tmp_path, 1000)
    started = time.perf_counter()
    assert main([str(tmp_path), "--no-plots"]) == 0
    made = time.perf_counter() - started
    page = tmp_path / "report" / "index.html"
    tab = chromium.new_page()
    started = time.perf_counter()
    tab.goto(page.as_uri())
    expect(tab.locator("body[data-ready=yes]")).to_be_attached(timeout=60_000)
    loaded = time.perf_counter() - started
    script = "() => { const t = performance.now(); by('search').value = '19'; by('search').oninput(); return performance.now() - t; }"
    filtered = tab.evaluate(script) / 1000
    print(
        f"1,000 checkpoints x 5 tasks: made in {made:.1f} s, {page.stat().st_size / 2**20:.1f} MB, loaded in {loaded:.1f} s, filtered in {filtered:.2f} s"
    )
    assert tab.evaluate("shown.length") == 20  # names with 19 in them
    assert made < 60
    assert loaded < 8
    assert filtered < 0.5
    tab.close()
