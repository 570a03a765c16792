"""`examples/tags_with_maps.ipynb`, executed as it stands and with paths of one's own."""

import argparse
from pathlib import Path

import nbformat
import pytest
import timm
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import CheckpointSaver

import timm_csra

from .paper import NAMES, pictures, scores_of_classes, scores_of_locations, tiny

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "tags_with_maps.ipynb"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels import this checkout, reach no Hub, and leave nothing in the home folder."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    return tmp_path


def executed(folder: Path, parameters: str = "", afterwards: str = "") -> nbformat.NotebookNode:
    """With other parameters, and a cell more at the end."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += f"\n{parameters}"
    notebook.cells.append(new_code_cell(f"import torch\n{afterwards}"))
    return NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()


def text(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))


def pngs(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", ()) for output in outputs)


def test_it_is_stored_without_outputs() -> None:
    """They would be megabytes of pictures in the history, and of an older version than the code beside them."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert cell.metadata.keys() <= {"tags"}
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.cells[1].metadata["tags"] == ["parameters"], "for papermill"


@pytest.mark.slow
def test_it_runs_as_it_stands(kernel: Path) -> None:
    """Without network and without a checkpoint of one's own: the cup of coffee is found."""
    notebook = executed(kernel)
    printed = text(notebook)
    _, _, tags = printed.partition("coffee.png\n")
    plain, wrapped = (line.split(": ", 1)[1] for line in tags.splitlines()[:2])
    assert "espresso" in plain and "espresso" in wrapped, printed
    assert pngs(notebook) == 3
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))


@pytest.mark.slow
def test_a_training_checkpoint_and_a_folder(kernel: Path) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = argparse.Namespace(model="test_resnet", num_classes=5, img_size=96)
    (kernel / "train").mkdir()
    CheckpointSaver(model, optimizer, arguments, checkpoint_dir=str(kernel / "train")).save_checkpoint(1, metric=1.0)
    (kernel / "names.txt").write_text("\n".join(NAMES))
    files = pictures(kernel / "photos", 3)
    notebook = executed(
        kernel,
        f'CHECKPOINT, CLASS_NAMES = "file:test_resnet@{kernel}/train/model_best.pth.tar", "names.txt"\n'
        'PHOTOGRAPHS, LAM, TOP, SHOWN, OUT = "photos", 0.4, 2, 2, "out"',
        'torch.save({"scores": scores, "maps": maps, "plain": plain}, "found.pt")',
    )
    config = resolve_model_data_config(timm.create_model("test_resnet")) | {"crop_mode": "squash", "crop_pct": 1.0}
    transform = create_transform(**config | {"input_size": (3, 96, 96)})
    x = torch.stack([transform(Image.open(file).convert("RGB")) for file in files[:2]])
    found = torch.load(kernel / "found.pt", weights_only=True)
    with torch.inference_mode():
        torch.testing.assert_close(found["plain"], model(x))
    expected = scores_of_classes(model, x, 0.4, "log_softmax")
    torch.testing.assert_close(found["scores"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["maps"], scores_of_locations(model, x, "log_softmax"), rtol=1e-4, atol=1e-4)
    for file, best in zip(files, expected.topk(2).indices, strict=False):
        _, _, tags = text(notebook).partition(f"{file.name}\n")
        assert tags.splitlines()[1] == f"  wrapped: {'; '.join(NAMES[k] for k in best)}"
    assert pngs(notebook) == 2
    again = timm_csra.from_pretrained(kernel / "out")
    assert again.csra == timm_csra.CSRAConfig(0.4, scores="log_softmax")
    assert again.pretrained_cfg["label_names"] == NAMES
