"""Figures in README and documentation are those of the committed tables."""

from pathlib import Path

import pytest

from benchmarks.claims import ROOT, main


def test_every_figure_stands_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([])
    told = capsys.readouterr().out
    assert status == 0, told
    assert int(told.splitlines()[-1].split()[0]) > 60


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("mosaics +3.21 [+2.67, +3.75] of mAP", 0),
        ("mosaics 3.21 [2.67, 3.75] of mAP", 0),
        ("mosaics +3.2 [+2.7, +3.7] of mAP", 0),  # fewer digits
        ("mosaics +3.21 [+2.67, +3.85] of mAP", 1),
        ("mosaics -3.21 [-3.75, -2.67] of mAP", 1),
        ("COCO loses 3.39 [0.91, 5.19]", 0),  # a loss without its sign
        ("COCO gains +3.39 [+0.91, +5.19]", 1),
        ("COCO \u22123.39 [\u22125.19, \u22120.91]", 0),
        ("a wrapped ResNet-50 takes 1.027 [1.021, 1.034]", 0),
        ("a wrapped ResNet-50 takes 1.026 [1.021, 1.034]", 1),
        ("nothing is said", 1),  # no figure at all: the pattern fits no more
    ],
)
def test_a_figure_that_drifts_is_found(
    text: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (page := tmp_path / "page.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
    assert main([str(page)]) == status
    told = capsys.readouterr().out
    assert (f"{page}:3: " in told) is (status == 1 and "nothing" not in text)


def test_output_of_other_commands_is_not_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (page := tmp_path / "page.md").write_text(
        "```\nlrap +10.74 [+8.69, +12.79]\n```\n- item\n  ```text\n  +1.00 [+0.00, +2.00]\n  ```\n+3.21 [+2.67, +3.75]\n"
    )
    assert main([str(page)]) == 0
    assert "1 gains with intervals, 0 of them in no table" in capsys.readouterr().out


def test_it_looks_at_the_pages_of_this_checkout() -> None:
    assert (ROOT / "README.md").is_file()
