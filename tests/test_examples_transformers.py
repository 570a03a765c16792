"""`examples/transformers_pipeline.py`: scores of the pipeline, and what is saved and loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_csra
from examples.transformers_pipeline import csra_pipeline, main, save

from .paper import NAMES, pictures, refused, saved, scores_of_classes, tiny


def scored(pipe: Any, files: list[Path]) -> torch.Tensor:
    """`(N, K)`, in the order of the classes."""
    found = pipe([str(file) for file in files], top_k=len(NAMES), function_to_apply="none")
    return torch.tensor([[{tag["label"]: tag["score"] for tag in tags}[name] for name in NAMES] for tags in found])


def inputs(files: list[Path], plain: torch.nn.Module) -> torch.Tensor:
    transform = create_transform(**resolve_model_data_config(plain))
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


def test_scores_are_those_of_the_formula_and_with_lam_0_of_the_plain_pipeline(tmp_path: Path) -> None:
    folder, plain = saved(tmp_path / "model", 0.4, "log_softmax")
    files = pictures(tmp_path / "photos", 3)
    x = inputs(files, plain)
    pipe = csra_pipeline(folder)
    assert pipe.model.timm_model.csra == timm_csra.CSRAConfig(0.4, scores="log_softmax"), "as it was saved"
    torch.testing.assert_close(
        scored(pipe, files), scores_of_classes(plain, x, 0.4, "log_softmax"), rtol=1e-4, atol=1e-4
    )
    pipe = csra_pipeline(folder, lam=0.9, scores="logits")
    torch.testing.assert_close(scored(pipe, files), scores_of_classes(plain, x, 0.9, "logits"), rtol=1e-4, atol=1e-4)
    hidden = pipe.model(x, output_hidden_states=True)
    torch.testing.assert_close(hidden.logits, pipe.model(x).logits)
    unwrapped = transformers.pipeline("image-classification", model=folder)
    assert not timm_csra.is_wrapped(unwrapped.model.timm_model)
    pipe.model.timm_model.csra.lam = 0
    assert torch.equal(scored(pipe, files), scored(unwrapped, files))
    assert torch.equal(scored(csra_pipeline(folder, lam=0), files), scored(unwrapped, files))


def test_what_it_saves_is_loaded_in_four_ways(tmp_path: Path) -> None:
    _, plain = saved(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["csra"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    files = pictures(tmp_path / "photos", 2)
    x = inputs(files, plain)
    pipe = csra_pipeline(str(tmp_path / "plain"), lam=0.3, scores="log_softmax")
    pipe.model.timm_model.csra.lam = 0.7  # changed after it was wrapped
    save(pipe, tmp_path / "saved")
    expected = scores_of_classes(plain, x, 0.7, "log_softmax")

    again = csra_pipeline(str(tmp_path / "saved"))
    torch.testing.assert_close(scored(again, files), expected, rtol=1e-4, atol=1e-4)
    ours = timm_csra.from_pretrained(tmp_path / "saved")
    assert ours.csra == pipe.model.timm_model.csra and ours.pretrained_cfg["label_names"] == NAMES
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        of_timm = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
        of_transformers = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(of_timm(x), plain(x)) and torch.equal(of_transformers(x).logits, plain(x))


def test_a_folder_that_timm_saved(tmp_path: Path) -> None:
    """transformers alone fails on those of timm 1.0.31, which has the number of classes twice in them."""
    timm.models.save_for_hf(tiny(), str(tmp_path / "model"), safe_serialization=True)
    (file,) = pictures(tmp_path / "photos", 1)
    pipe, plain = csra_pipeline(str(tmp_path / "model"), lam=0.2), tiny()
    found = sorted(tag["score"] for tag in pipe(str(file), top_k=5, function_to_apply="none"))
    expected = scores_of_classes(plain, inputs([file], plain), 0.2, "logits")[0].sort().values
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, plain = saved(tmp_path / "model")
    (file,) = pictures(tmp_path / "photos", 1)
    main([folder, str(file), "--lam", "0.2", "--top", "2", "--save", str(tmp_path / "out")])
    best = scores_of_classes(plain, inputs([file], plain), 0.2, "log_softmax")[0].topk(2)
    tags = [f"  {score:8.3f}  {NAMES[k]}" for k, score in zip(best.indices, best.values, strict=True)]
    assert capsys.readouterr().out.splitlines() == [
        str(file), *tags, f"{tmp_path / 'out'}: saved with CSRAConfig(lam=0.2, temperature=(inf,), scores='log_softmax')"
    ]  # fmt: skip
    assert timm_csra.from_pretrained(tmp_path / "out").csra.lam == 0.2
    with refused("model: lam must be finite and at least 0"):
        main([folder, str(file), "--lam", "-1"])
    with refused("--top 0: expected at least 1"):
        main([folder, str(file), "--top", "0"])


def test_pictures_that_cannot_be_read_and_those_of_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, plain = saved(tmp_path / "model", 0.2, "logits")
    (file,) = pictures(tmp_path / "photos", 1)
    grey = Image.open(file).convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) << 8).save(tmp_path / "16.png")
    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:200])
    gone = tmp_path / "gone.png"
    assert main([folder, str(tmp_path / "cut.png"), str(gone), str(tmp_path / "16.png"), "--top", "1"]) == 1
    x = create_transform(**resolve_model_data_config(plain))(grey.convert("RGB"))[None]
    best = scores_of_classes(plain, x, 0.2, "logits")[0].max(dim=0)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(tmp_path / "16.png"), f"  {best.values:8.3f}  {NAMES[best.indices]}"]
    assert all(f"{tmp_path / name}: not read: " in printed.err for name in ("cut.png", "gone.png"))


def test_a_model_that_is_not_of_timm_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    with refused("found a vit model, expected a timm model, such as timm/resnet50"):
        main([str(tmp_path), "photo.jpg"])


def test_wrapping_the_container_says_what_to_wrap(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(timm_csra.UnsupportedModelError, match=r"It contains one: wrap\(model.timm_model\) instead"):
        timm_csra.wrap(model)
