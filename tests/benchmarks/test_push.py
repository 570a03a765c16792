"""Which checkpoints `--push-best` takes, and what their repositories are called."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import validate_repo_id

from benchmarks.checkpoints.find import Checkpoint
from benchmarks.reporting.push import Choice, choose, repository_clash

CHECKPOINT = Checkpoint("local-dir", "folder/mine")


def record(task: str, requested: str = "1x", status: str = "ok") -> dict[str, Any]:
    best = [
        {"protocol": "best", "metric": metric, "lam": lam, "temperature": "1+inf", "scores": scores}
        for metric, lam, scores in (("top1", "0.2", "logits"), ("mAP", "0.5", "log_softmax"), ("lrap", "1", "logits"))
    ]
    return {"key": {"task": task, "requested": requested}, "task": task, "requested": requested, "status": status,
            "results": best, "data": "photos"}  # fmt: skip


def row(record: dict[str, Any], metric: str, verdict: str, p: float = 0.01, **changes: Any) -> dict[str, Any]:
    numbers = {"gain": 2.0, "ci_low": 1.0, "ci_high": 3.0, "p_holm": p}
    fixed = {"protocol": "crossfit", "metric": metric, "verdict": verdict, "baseline_check": None}
    return {**record, **fixed, **numbers, **changes}


SINGLE, MOSAIC, LARGE = record("single"), record("mosaic"), record("mosaic", "2x")
CASES = {
    "better": ([row(MOSAIC, "mAP", "better")], "mosaic"),
    "the clearest decides": ([row(SINGLE, "top1", "better", 0.001), row(MOSAIC, "mAP", "better", 0.02)], "single"),
    "better here, no evidence there": ([row(SINGLE, "top1", "no evidence"), row(MOSAIC, "mAP", "better")], "mosaic"),
    "better here, worse there": ([row(SINGLE, "top1", "worse"), row(MOSAIC, "mAP", "better")], None),
    "no evidence": ([row(MOSAIC, "mAP", "no evidence")], None),
    "another metric": ([row(MOSAIC, "lrap", "better"), row(MOSAIC, "mAP", "no evidence")], None),
    "another size": ([row(LARGE, "mAP", "better")], None),
    "not cross-fitted": ([row(MOSAIC, "mAP", "better", protocol="fixed")], None),
    "baseline is not the published one": ([row(MOSAIC, "mAP", "better", baseline_check="flagged")], None),
    "of another checkpoint": ([row({**MOSAIC, "key": {"task": "another"}}, "mAP", "better")], None),
    "nothing measured": ([], None),
}
LAM = {"single": 0.2, "mosaic": 0.5}
SCORES = {"single": "logits", "mosaic": "log_softmax"}


@pytest.mark.parametrize("case", CASES)
def test_only_what_gains_for_sure_is_pushed(case: str) -> None:
    rows, expected = CASES[case]
    records = [SINGLE, MOSAIC, LARGE, record("real", status="failed")]
    choices = choose(rows, {CHECKPOINT: records})
    assert [choice.row["task"] for choice in choices] == ([expected] if expected else [])
    for choice in choices:
        assert choice.repository("user/csra") == "user/csra-mine"
        assert (choice.lam, choice.temperature) == (LAM[str(expected)], (1.0, float("inf")))
        assert choice.scores == SCORES[str(expected)]
        assert choice.records == (SINGLE, MOSAIC, LARGE)
        gain = f"local-dir:folder/mine: {choice.row['metric']} +2.00 [+1.00, +3.00] on photos, {expected} (Holm p = "
        assert str(choice) == f"{gain}{choice.row['p_holm']:.2g}), {choice.scores}, lam {choice.lam:g}, T 1+inf"


@pytest.mark.parametrize(
    ("source", "id", "name"),
    [
        ("timm", "resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("hf-hub", "user/my-model@v1.0", "my-model"),
        ("pypi", "tf_efficientnet_lite0", "tf_efficientnet_lite0"),
        ("local-dir", "checkpoints/my cats (2)", "my-cats-2"),
        ("file", "resnet50@output/train/20261126-resnet50/model_best.pth.tar", "20261126-resnet50"),
        ("file", "resnet50.a1_in1k@output/train/run@home/last.pth.tar", "run-home"),
        ("file", "resnet50@output/run/checkpoint-12.pth.tar", "run"),
        ("file", "resnet50@output/run/averaged.safetensors", "run"),
        ("file", "resnet50@weights/cats.vs.dogs.pth", "cats.vs.dogs"),
        ("file", "resnet50@cats.safetensors", "cats"),
        ("file", "resnet50@/model_best.pth.tar", "resnet50"),
        ("file", "resnet50@~~~/last.pth.tar", "resnet50"),
    ],
)
def test_the_repository_is_called_after_the_checkpoint(source: str, id: str, name: str) -> None:
    choice = Choice(Checkpoint(source, id), {}, 0.1, (1.0,), "logits", ())
    assert choice.repository("user/csra") == f"user/csra-{name}"
    validate_repo_id(choice.repository("user/csra"))


def test_a_folder_given_relatively_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cats" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cats")
    for source, id in (("local-dir", "."), ("local-dir", "inner/.."), ("file", "resnet50@last.pth.tar")):
        assert Choice(Checkpoint(source, id), {}, 0.1, (1.0,), "logits", ()).repository("user/csra") == "user/csra-cats"


def test_two_checkpoints_do_not_go_to_one_repository() -> None:
    """The second would replace the first."""
    ids = ("resnet50@out/run/last.pth.tar", "resnet50@out/other/last.pth.tar", "resnet50@out/run/model_best.pth.tar")
    choices = [Choice(Checkpoint("file", id), {}, 0.1, (1.0,), "logits", ()) for id in ids]
    assert repository_clash(choices[:2], "user/csra") is None
    assert repository_clash(choices, "user/csra") == (
        "--push-best: file:resnet50@out/run/last.pth.tar and file:resnet50@out/run/model_best.pth.tar would both go to "
        "user/csra-run; expected a repository for each. Name one of them in --models, or push them with prefixes of "
        "their own."
    )
