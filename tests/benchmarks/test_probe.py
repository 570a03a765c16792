"""Heads on frozen features: against scikit-learn and wrapped models, and from photographs on disk to the table."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import timm_csra
from benchmarks.probe import FOLDS, Frozen, fit, main, mean_average_precision, out_of_fold, sigmoid, softmax
from timm_csra.evaluation.scoring import PLAIN, Setting

from .test_survival import save


def features_and_labels(images: int = 40) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    features = 3 + rng.standard_normal((images, 6)) * [1, 2, 3, 4, 5, 0]  # the last is constant
    labels = rng.random((images, 3)) < 0.4
    labels[:3] = False
    return torch.from_numpy(features).float(), torch.from_numpy(labels).to(torch.int8)


def test_a_sigmoid_head_is_a_logistic_regression_for_each_class() -> None:
    features, targets = features_and_labels()
    weight, bias = fit(features, targets, sigmoid)
    scaled = StandardScaler().fit_transform(features)
    for of_class, target in zip((features.double() @ weight.T + bias).T, targets.T, strict=True):
        expected = LogisticRegression(tol=1e-8).fit(scaled, target).decision_function(scaled)
        np.testing.assert_allclose(of_class, expected, atol=1e-4)


def test_a_softmax_head_is_a_logistic_regression_of_each_image_once_for_each_of_its_labels() -> None:
    features, targets = features_and_labels()
    weight, bias = fit(features, targets, softmax)
    scaled, (image, label) = StandardScaler().fit_transform(features), targets.numpy().nonzero()
    # The mean is that of all images, those without a label included: as in `fit`.
    share = 1 / targets.sum(dim=1).numpy()[image]
    model = LogisticRegression(tol=1e-8, max_iter=1000).fit(scaled[image], label, sample_weight=share)
    expected = model.predict_log_proba(scaled)
    found = (features.double() @ weight.T + bias).log_softmax(dim=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_is_not_judged_does_not_train() -> None:
    _, targets = features_and_labels()
    for loss, row in ((sigmoid, [-1, -1, -1]), (softmax, [0, -1, 0])):
        unjudged = targets.clone()
        unjudged[5] = torch.tensor(row)
        logits = torch.zeros(len(targets), 3, requires_grad=True)
        loss(logits, unjudged).backward()
        assert logits.grad is not None and not logits.grad[5].any() and logits.grad[6].any()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_scores_are_those_of_the_wrapped_model(name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(5, 3, *model.pretrained_cfg["input_size"][1:])
    batches = iter([(images[:2], torch.zeros(2, 3)), (images[2:], torch.zeros(3, 3))])
    frozen, targets = Frozen.of(model, batches, "cpu")
    assert targets.shape == (5, 3) and model.num_classes == 7
    width = frozen.pooled.shape[1]
    head = (torch.randn(3, width), torch.randn(3))
    scores = frozen.scores(np.array([4, 1]), head)
    model.reset_classifier(3)
    model.get_classifier().load_state_dict(dict(zip(("weight", "bias"), head, strict=True)))
    for setting in (PLAIN, Setting(0.1, (float("inf"),)), Setting(0.3, (float("inf"),), "log_softmax")):
        with torch.inference_mode():
            expected = timm_csra.wrap(model, *setting)(images[[4, 1]])
        torch.testing.assert_close(scores.logits(setting), expected, rtol=1e-4, atol=1e-4)
        timm_csra.unwrap(model)


def test_lam_is_chosen_on_scores_of_heads_that_have_not_seen_the_image() -> None:
    """Labels that say nothing of the images are learned by heart, and not predicted."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2).eval()
    images, targets = torch.randn(40, 3, 64, 64), (torch.rand(40, 4) < 0.5).to(torch.int8)
    frozen, _ = Frozen.of(model, iter([(images, targets)]), "cpu")
    rows = np.arange(40)[::-1].copy()
    learned = targets[rows.copy()]
    by_heart = frozen.scores(rows, fit(frozen.pooled[rows], learned, sigmoid))
    assert mean_average_precision(by_heart, learned, PLAIN) > 95
    predicted = out_of_fold(frozen, rows, learned, sigmoid, seed=3)
    assert mean_average_precision(predicted, learned, PLAIN) < 75
    assert predicted.base.shape == (40, 4) and FOLDS == 5


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Photographs with several labels: each lights up a corner."""
    (tmp_path / "several" / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), ["file,labels"]
    for index in range(48):
        pixels, present = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8), rng.random(3) < 0.5
        for label in present.nonzero()[0]:
            pixels[16 * label : 16 * label + 16, :16, label] = 255
        Image.fromarray(pixels).save(tmp_path / "several" / "images" / f"{index}.png")
        rows.append(f"images/{index}.png,{' '.join(map(str, present.nonzero()[0]))}")
    (tmp_path / "several" / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "several" / "classes.txt").write_text("0 crate\n1 lamp\n2 rope\n")
    return tmp_path / "several"


def test_photographs(tmp_path: Path, several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ",".join(save(tmp_path / f"model{seed}", seed) for seed in range(2))
    out = tmp_path / "probe.csv"
    arguments = ["--models", models, "--img-size", "64", "--workers", "0", "--device", "cpu", "--splits", "3"]
    assert main([*arguments, "--data", str(several), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["split"], row["loss"]) for row in rows] == [
        (model, str(split), loss)
        for model in ("model0", "model1")
        for split in range(3)
        for loss in ("sigmoid", "softmax")
    ]
    assert len({row["plain"] for row in rows}) > 6
    for model in ("model0", "model1"):
        for how, prefix in (("fixed", ""), ("tuned", "tuned_")):
            of = {
                loss: np.array(
                    [
                        [float(row[prefix + kind]) for kind in ("logits", "log_softmax")]
                        for row in rows
                        if (row["model"], row["loss"]) == (model, loss)
                    ]
                )
                for loss in ("sigmoid", "softmax")
            }
            for loss, gains in (of | {"difference": of["sigmoid"] - of["softmax"]}).items():
                (line,) = re.findall(rf"^{model} +64 +{how} +{loss} .*$", printed, re.M)
                shown = re.findall(r"([+-]\d+\.\d\d) \+- (\d+\.\d\d) \((\d)/3\)", line)
                for values, figures in zip((*gains.T, gains[:, 0] - gains[:, 1]), shown, strict=True):
                    expected = [values.mean(), values.std(ddof=1), (values > 1e-6).sum()]
                    assert [float(x) for x in figures] == pytest.approx(expected, abs=0.0051)
    assert "several, multilabel, 48 images" in printed and "Splits share images" in printed
    again = tmp_path / "again.csv"
    assert main([*arguments, "--data", str(several), "--out", str(again)]) == 0
    assert again.read_text() == out.read_text()


def test_mosaics_of_classes_that_the_head_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for index in range(96):
        folder = tmp_path / "photos" / ("crate", "lamp", "rope")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    arguments = ["--models", save(tmp_path / "model"), "--data", str(tmp_path / "photos"), "--splits", "1"]
    arguments += ["--img-size", "64", "--workers", "0", "--device", "cpu"]
    assert main([*arguments, "--task", "mosaic"]) == 0
    assert "photos, mosaic 2x2, 24 images" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "the task multilabel needs several labels for each image" in capsys.readouterr().err


def test_what_does_not_fit_is_told(tmp_path: Path, several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", save(tmp_path / "model"), "--data", str(several), "--workers", "0", "--img-size", "64"]
    assert main([*arguments, "--task", "mosaic", "--grid", "2,3"]) == 2
    assert "found 2 grids; expected one." in capsys.readouterr().err
    assert main([*arguments, "--limit", "12"]) == 2
    assert "several: found 12 images; expected 20 or more." in capsys.readouterr().err
    rows = [
        line if number % 8 == 0 else f"{line.split(',')[0]},"
        for number, line in enumerate((several / "labels.csv").read_text().splitlines())
    ]
    (several / "labels.csv").write_text("\n".join(rows))
    assert main(arguments) == 2
    assert re.search(
        r"several: found \d classes with 5 positives among 24 held-out images and one among", capsys.readouterr().err
    )


def test_a_head_of_several_layers_is_refused() -> None:
    model = timm.create_model("test_resnet", num_classes=2).eval()
    model.fc = torch.nn.Sequential(torch.nn.Linear(model.num_features, 4), torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match="test_resnet: found a Sequential as classifier; expected one linear layer"):
        Frozen.of(model, iter([(torch.randn(1, 3, 64, 64), torch.zeros(1, 2))]), "cpu")
