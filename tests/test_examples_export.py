"""`examples/export_onnx.py`: what both runtimes compute, against the formula."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from examples.export_onnx import difference, main, onnx_runtime, open_vino

from .paper import NAMES, refused, saved, scores_of_classes, scores_of_locations

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.slow
@pytest.mark.parametrize("maps", [True, False], ids=["maps", "scores alone"])
def test_both_runtimes_give_the_scores_of_the_formula(
    tmp_path: Path, maps: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, plain = saved(tmp_path / "model", 0.4, "log_softmax")
    out = tmp_path / "model.onnx"
    assert main([folder, "--out", str(out), "--lam", "0.7", *(["--maps"] if maps else [])]) == 0
    printed = capsys.readouterr().out
    assert "exporting with CSRAConfig(lam=0.7, temperature=(inf,), scores='log_softmax')" in printed
    for name in ("ONNX Runtime", "OpenVINO"):
        assert f"{name}: differs from PyTorch by at most " in printed
    assert "of the largest score (allowed: 0.001)" in printed

    x = torch.randn(5, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    for count in (1, 5):
        expected = [scores_of_classes(plain, x[:count], 0.7, "log_softmax")]
        expected += [scores_of_locations(plain, x[:count], "log_softmax")] if maps else []
        for load in (onnx_runtime, open_vino):
            found = load(out)(x[:count].numpy())
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b.numpy(), rtol=1e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.onnx"], "weights are in the file"
    stored = onnx.load(out)
    metadata = {
        entry.key: json.loads(entry.value) for entry in stored.metadata_props if entry.key in ("csra", "label_names")
    }
    assert metadata["label_names"] == NAMES and metadata["csra"]["lam"] == 0.7
    convolutions = sum(node.op_type == "Conv" for node in stored.graph.node)
    assert convolutions == sum(isinstance(module, torch.nn.Conv2d) for module in plain.modules()), "one pass"


def test_a_difference_beyond_the_tolerance_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved(tmp_path / "model")
    monkeypatch.setattr("examples.export_onnx.export", lambda model, out, maps: out.write_bytes(b"0" * 10**6))
    right, wrong = ((lambda file, f=f: lambda images: [f * EXPECTED[0]]) for f in (1, 1.01))
    monkeypatch.setattr("examples.export_onnx.onnx_runtime", right)
    monkeypatch.setattr("examples.export_onnx.open_vino", wrong)
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    EXPECTED = [scores_of_classes(saved(tmp_path / "again")[1], images, 0.4, "log_softmax").numpy()]
    assert main([folder, "--out", str(tmp_path / "model.onnx")]) == 1
    assert (
        "OpenVINO: differs from PyTorch by at most 1.0e-02 of the largest score (allowed: 0.001)"
        in capsys.readouterr().out
    )


def test_the_difference_is_the_largest_of_all_outputs_and_nan_counts() -> None:
    a, b = np.array([1.0, -10.0]), np.array([4.0])
    assert difference([a, b], [a, b]) == 0
    assert difference([a + [0.1, 0], b + 1], [a, b]) == 0.25
    assert not difference([np.array([np.nan])], [np.array([1.0])]) <= 1e9


def test_a_model_that_cannot_be_had(tmp_path: Path) -> None:
    with refused("my-modle: .*an existing folder, or file:ARCH@PATH"):
        main(["my-modle"])
    with refused("lam must be finite and at least 0"):
        main([saved(tmp_path)[0], "--lam", "-1"])
    for arguments, said in {
        ("--out", str(tmp_path)): "found a folder; expected the name of a file",
        ("--out", str(tmp_path / "no" / "model.onnx")): "found no folder that it could be written to",
        ("--tolerance", "nan"): "--tolerance nan: expected a positive number",
    }.items():
        with refused(said):
            main(["test_resnet", *arguments])
