"""Export a wrapped model to ONNX, run it with ONNX Runtime and OpenVINO, and compare both with PyTorch.

    python examples/export_onnx.py my-model --out my-model.onnx --maps

lam and the other settings are constants of the graph: to change them, export again. The input is `images`, (N, 3, H, W)
with any N; the outputs are `scores` (N, K) and, with --maps, `maps` (N, K, rows, columns), the per-location scores from
the same pass through the backbone. The file's metadata has the settings and the class names. The exit code is 1 if a
runtime differs from PyTorch by more than the tolerance.

Needs pip install '.[examples]'.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import timm_csra
from timm_csra.trained import class_names

Run = Callable[[np.ndarray], list[np.ndarray]]
TOLERANCE = 1e-3  # relative to the largest score, since runtimes sum float32 in another order


class WithMaps(nn.Module):
    """Returns the scores of the classes and of every location."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps, scores = timm_csra.score_maps(self.model, images, self.model.csra.scores, return_logits=True)
        return scores, maps


def export(model: nn.Module, out: Path, maps: bool = False) -> None:
    """Write one ONNX file that contains the weights."""
    images = torch.zeros(2, *resolve_model_data_config(model)["input_size"])
    program = torch.onnx.export(
        WithMaps(model).eval() if maps else model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["scores", "maps"][: 1 + maps],
        dynamic_shapes=({0: torch.export.Dim("N", min=1, max=4096)},),
        verbose=False,
    )
    metadata = {"csra": model.csra.to_dict(), "label_names": class_names(model)}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    program.save(out, external_data=False)


def onnx_runtime(file: Path) -> Run:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def open_vino(file: Path) -> Run:
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # the default is bfloat16 on CPUs that support it
    compiled = openvino.Core().compile_model(str(file), "CPU", exact)
    return lambda images: [*compiled({"images": images}).values()]


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the largest difference relative to the largest score."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a timm name, a folder, hf-hub:USER/NAME or file:ARCH@PATH")
    parser.add_argument("--out", type=Path, default=Path("model.onnx"), help="default: %(default)s")
    parser.add_argument("--lam", type=float, help="default: the saved one, else 0.1")
    parser.add_argument("--scores", choices=["logits", "log_softmax"], help="default: the saved one, else logits")
    parser.add_argument("--maps", action="store_true", help="add the per-location scores as a second output")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="relative to the largest score (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if args.out.is_dir() or not args.out.parent.is_dir():
        found = "a folder" if args.out.is_dir() else "no folder that it could be written to"
        parser.error(f"--out {args.out}: found {found}; expected the name of a file in an existing folder.")
    if not args.tolerance > 0:
        parser.error(f"--tolerance {args.tolerance:g}: expected a positive number.")
    given = {key: value for key in ("lam", "scores") if (value := getattr(args, key)) is not None}
    create = timm_csra.create_model if timm.is_model(args.model) else timm_csra.from_pretrained
    try:
        model = create(args.model, **given).eval()
        print(f"{args.model}: exporting with {model.csra}")
        export(model, args.out, args.maps)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser.error(f"{error}" if args.model in f"{error}" else f"{args.model}: {error}")

    images = torch.randn(3, *resolve_model_data_config(model)["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = [tensor.numpy() for tensor in (WithMaps(model)(images) if args.maps else (model(images),))]
    failed = 0
    for name, load in {"ONNX Runtime": onnx_runtime, "OpenVINO": open_vino}.items():
        found = difference(load(args.out)(images.numpy()), expected)
        failed += not found <= args.tolerance
        print(f"{name}: differs from PyTorch by at most {found:.1e} of the largest score (allowed: {args.tolerance:g})")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
