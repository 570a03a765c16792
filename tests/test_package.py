"""What is installed and imported: no extra unless asked for, nothing but the library in the wheel."""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
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
    missing = {
        "torchmetrics": ("import timm_csra.evaluation", "evaluation", "tune"),
        "statsmodels": ("import timm_csra; timm_csra.tune", "evaluation", "tune"),
        "matplotlib": ("import timm_csra; timm_csra.overlay", "visualize", "demo"),
        "gradio": ("import timm_csra.demo", "demo", "demo"),
    }
    lines = ["import sys", "import timm"]
    for name, (statement, *_) in missing.items():
        lines += [f"sys.modules[{name!r}] = None", "try:", f"    {statement}"]
        lines += ["except ModuleNotFoundError as error:", "    print(error)", f"del sys.modules[{name!r}]"]
    assert python("\n".join(lines)).stdout.splitlines() == [
        f"timm_csra.{module} needs {name}, which is not installed: pip install 'timm-csra[{extra}]'"
        for name, (_, module, extra) in missing.items()
    ]


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as a release is."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"timm_csra"}
    assert {f"timm_csra/{file}" for file in ("py.typed", "demo/style.css", "demo/whole_page.css")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = {
        line.split()[1].split(">")[0] for line in metadata.splitlines() if re.match(r"Requires-Dist: [^;]*$", line)
    }
    assert required == {"torch", "timm", "huggingface-hub", "safetensors", "numpy"}


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_what_is_uploaded_is_small_and_pypi_takes_it(wheel: Path) -> None:
    files = sorted(map(str, wheel.parent.iterdir()))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    subprocess.run([Path(sys.executable).with_name("check-wheel-contents"), wheel], check=True)
    assert wheel.stat().st_size < 150_000
    assert max(Path(file).stat().st_size for file in files) < 1_500_000


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_another_project_sees_the_types(wheel: Path, tmp_path: Path, checker: str) -> None:
    """Of the installed wheel, not of the checkout: what it may do is accepted, and each mistake is found."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    interpreter = tmp_path / "venv" / "bin" / "python"
    own = subprocess.run([interpreter, "-c", _PLACE], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", own, wheel], check=True)
    (Path(own) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copy(Path(__file__).with_name("consumer.txt"), tmp_path / "consumer.py")
    commands = {
        # With the settings and the cache of this project: torch alone takes mypy most of a minute otherwise.
        "mypy": ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache", "--python-executable"],
        "pyright": ["--pythonpath"],
    }
    command = [sys.executable, "-m", checker, *commands[checker], interpreter, "consumer.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    wrong = [
        number for number, line in enumerate((tmp_path / "consumer.py").read_text().splitlines(), 1) if "#" in line
    ]
    found = [int(line) for line in re.findall(r"consumer\.py:(\d+):.*error", said.stdout)]
    assert found == wrong, said.stdout + said.stderr


_PLACE = "import sysconfig; print(sysconfig.get_path('purelib'))"


@pytest.mark.benchmark
def test_importing_takes_at_most_50_ms_beyond_timm() -> None:
    """By Python's own account, which is itself some of it, with bytecode; or 2 % of what timm takes, where a machine is
    slow; the best of three, as other programs make it longer."""
    command = [sys.executable, "-X", "importtime", "-c", "import timm, timm_csra"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    shares = []
    for _ in range(3):
        said = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stderr
        timm_alone, beyond = (
            int(re.search(rf"\| +(\d+) \| {name}$", said, re.MULTILINE)[1]) for name in ("timm", "timm_csra")
        )
        shares.append(beyond / max(50_000, 0.02 * timm_alone))
        if shares[-1] <= 1:
            break
    assert min(shares) <= 1
