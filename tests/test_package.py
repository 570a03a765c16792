"""What is installed and imported: no extra unless asked for, nothing but the library in the wheel."""

import importlib
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import timm_csra

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = [
    "torchmetrics",
    "scipy",
    "rich",
    "matplotlib",
    "skimage",
    "sklearn",
    "benchmarks",
    "onnx",
    "gradio",
    "altair",
    "ray",
]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_importing_the_library_needs_no_extra() -> None:
    code = f"import sys, timm_csra; print([name for name in {EXTRAS} if name in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_a_missing_extra_is_named() -> None:
    result = python("import sys; sys.modules['torchmetrics'] = None; import timm_csra.evaluation")
    assert "evaluation needs torchmetrics, which is not installed: pip install 'timm-csra[tune]'" in result.stderr
    result = python("import sys; sys.modules['statsmodels'] = None; import timm_csra; timm_csra.tune")
    assert "evaluation needs statsmodels, which is not installed: pip install 'timm-csra[tune]'" in result.stderr
    result = python("import sys; sys.modules['matplotlib'] = None; import timm_csra; timm_csra.overlay")
    assert "visualize needs matplotlib, which is not installed: pip install 'timm-csra[demo]'" in result.stderr
    result = python("import sys; sys.modules['gradio'] = None; import timm_csra.demo")
    assert "demo needs gradio, which is not installed: pip install 'timm-csra[demo]'" in result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'timm_csra' has no attribute 'wrapp'"):
        _ = timm_csra.wrapp


def test_everything_can_be_imported_and_public_names_are_documented() -> None:
    for module in pkgutil.walk_packages(timm_csra.__path__, "timm_csra."):
        assert importlib.import_module(module.name).__doc__
    for name in timm_csra.__all__:
        assert getattr(timm_csra, name).__doc__


def test_the_readme_has_exactly_two_commands_to_set_up() -> None:
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("python -m benchmarks.sweep --sample")
    assert commands[1].endswith("pytest -n auto")


def test_versions_agree() -> None:
    assert f"\n## {timm_csra.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {timm_csra.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"timm_csra"}
    assert "timm_csra/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = {
        line.split()[1].split(">")[0] for line in metadata.splitlines() if re.match(r"Requires-Dist: [^;]*$", line)
    }
    assert required == {"torch", "timm", "huggingface-hub", "safetensors", "numpy"}
