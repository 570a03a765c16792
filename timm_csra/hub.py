"""Save and load wrapped models in folders and on the Hugging Face Hub, in timm's own format plus one key.

`model.safetensors` holds the plain model's weights, and `config.json` is timm's with the settings under `csra`, so that
timm and transformers can load the same files, as the plain model.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models import is_model
from torch import nn

from .card import Record, model_card
from .config import CSRAConfig
from .errors import describe
from .patching import check_supported, is_wrapped, wrap
from .stored import CONFIG, FOREIGN_WEIGHTS, WEIGHTS, check_weights, no_weights, read_config, refuse_code
from .trained import read_trained
from .version import __version__

CARD = "README.md"
LABELS = ("label_names", "label_descriptions")
CLIENT: dict[str, Any] = {"library_name": "timm_csra", "library_version": __version__}

_logger = logging.getLogger(__name__)


def create_model(
    model_name: str,
    pretrained: bool = True,
    *,
    lam: float = 0.1,
    temperature: float | tuple[float, ...] = math.inf,
    scores: str = "logits",
    **kwargs: Any,
) -> nn.Module:
    """Create a model with `timm.create_model` and wrap it.

    Args:
        model_name: as for `timm.create_model`.
        pretrained: whether to load timm's pretrained weights.
        lam: see `wrap`.
        temperature: see `wrap`.
        scores: see `wrap`.
        kwargs: further arguments of `timm.create_model`.

    Returns:
        The wrapped model, in training mode as timm returns it.

    Raises:
        UnsupportedModelError, TypeError, ValueError: see `wrap`.

    Example:
        >>> import timm_csra
        >>> timm_csra.create_model('test_resnet', pretrained=False, lam=0.2).csra
        CSRAConfig(lam=0.2, temperature=(inf,), scores='logits')
    """
    CSRAConfig(lam, temperature, scores)  # validates the settings before anything is downloaded
    return wrap(timm.create_model(model_name, pretrained=pretrained, **kwargs), lam, temperature, scores)


def save_pretrained(
    model: nn.Module, directory: str | Path, *, results: Record | Sequence[Record] | None = None
) -> None:
    """Write `model.safetensors`, `config.json` and, unless there is one, the model card `README.md`.

    If writing fails, each file is either complete or unchanged.

    Args:
        model: a wrapped model; it is not changed.
        directory: the folder; it is created if it does not exist.
        results: records of `python -m benchmarks.sweep` for the card, measured with the same weights.

    Raises:
        TypeError: the model is not wrapped.
        ValueError: `from_pretrained` could not load the saved files, because the model has weights that timm does not
            build (a new classifier with another number of classes than `model.num_classes`, an MLP as classifier, a
            parametrization, a reparameterised model), or because it has no classifier. Or `results` are not finished
            records, or were measured with other weights.

    A change that has no weights and that timm does not record, such as another activation, is not saved:
    `from_pretrained` returns the architecture as `timm.create_model` builds it.

    Example:
        >>> import tempfile, timm_csra
        >>> model = timm_csra.create_model('test_resnet', pretrained=False).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     timm_csra.save_pretrained(model, folder)
        ...     timm_csra.from_pretrained(folder).csra
        CSRAConfig(lam=0.1, temperature=(inf,), scores='logits')
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=directory) as folder:
        _write(model, Path(folder), str(directory), results)
        for name in (WEIGHTS, CONFIG, CARD):
            if name != CARD or not (directory / CARD).exists():
                os.replace(Path(folder) / name, directory / name)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload a timm model wrapped by timm_csra",
    results: Record | Sequence[Record] | None = None,
) -> CommitInfo:
    """Push a wrapped model to the Hugging Face Hub in one commit. An existing model card is not changed.

    Args:
        model: a wrapped model.
        repo_id: `user/name`; the repository is created if it does not exist.
        private: whether a new repository is private.
        revision: a branch, created if it does not exist; `main` by default.
        create_pr: open a pull request instead of committing to the branch.
        token: access token of the Hub; by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message: message of the commit.
        results: records of `python -m benchmarks.sweep` for the card, measured with the same weights.

    Returns:
        huggingface_hub's `CommitInfo`, with the commit's URL.

    Raises:
        TypeError, ValueError: see `save_pretrained`; raised before anything is sent.
        huggingface_hub.errors.HfHubHTTPError: the Hub returned an error.
    """
    api = HfApi(token=token, **CLIENT)
    with TemporaryDirectory() as folder:
        _write(model, Path(folder), repo_id, results)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        names = [CONFIG, WEIGHTS]
        if not api.file_exists(repo_id, CARD, revision=revision):
            names.append(CARD)
        # Not `upload_folder`, which may split one folder into several commits.
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, Path(folder) / name) for name in names],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    lam: float | None = None,
    temperature: float | tuple[float, ...] | None = None,
    scores: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a wrapped model, or load any timm model and wrap it.

    Args:
        name_or_path: `user/repo` or `hf-hub:user/repo@revision` on the Hugging Face Hub, a folder,
            `local-dir:PATH`, or `file:ARCH@PATH` for a checkpoint of timm's train script, such as
            `file:resnet50@output/train/model_best.pth.tar`. An existing folder takes precedence over a repository of
            the same name.
        revision: branch, tag or commit of the repository.
        cache_dir: folder for downloads; huggingface_hub's cache by default.
        token: access token of the Hub; by default the one of `hf auth login` or `HF_TOKEN`.
        lam: replaces the stored value; None for the stored value, or the default of `wrap` where none is stored.
        temperature: as `lam`.
        scores: as `lam`.
        kwargs: further arguments of `timm.create_model`, e.g. `num_classes=5` or `img_size=448`.

    Returns:
        The wrapped model in eval mode.

    Raises:
        ValueError, TypeError: `name_or_path`, the settings, the configuration or the weights are invalid, or the
            weights do not fit the model. Where settings are stored, weights are read from `model.safetensors` alone.
        UnsupportedModelError: the model cannot be wrapped.
        huggingface_hub.errors.HfHubHTTPError: the Hub returned an error, or the repository does not exist.
        huggingface_hub.errors.LocalEntryNotFoundError: the Hub cannot be reached, and the model is not in the cache.
    """
    source, location = _parse(name_or_path, revision)
    name = f"{source}:{location}"
    if refused := [key for key in ("pretrained", "checkpoint_path") if key in kwargs]:
        raise TypeError(
            f"{name}: found the argument {refused[0]}, but from_pretrained loads the weights of the folder or "
            "repository. For other weights use timm_csra.create_model."
        )
    given: dict[str, Any] = {"lam": lam, "temperature": temperature, "scores": scores}
    given = {key: value for key, value in given.items() if value is not None}
    if source == "file":  # settings are never stored in one
        return wrap(read_trained(location).create(**kwargs), **given)
    if source == "local-dir":
        folder = Path(location)
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{name}: found no {CONFIG}; expected a folder in timm's format.")
        config, stored = read_config(folder / CONFIG, name)
    else:
        hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, **CLIENT}
        repo, _, revision = location.partition("@")
        file = Path(hf_hub_download(repo, CONFIG, revision=revision or None, **hub))
        config, stored = read_config(file, name)
        folder = file.parent  # its name is the commit, from which the weights are downloaded, too
        _download_weights(name, repo, folder.name, stored is not None, hub)
    if stored is not None:
        check_weights(name, folder / WEIGHTS, config)
    elif not (folder / WEIGHTS).is_file():
        refuse_code(name, folder)
    settings = stored or CSRAConfig()
    for key, value in given.items():
        setattr(settings, key, value)
    if stored is None:
        _logger.warning(f"{name}: {CONFIG} has no settings of timm_csra; wrapped with {settings}.")
    if (folder / WEIGHTS).is_file():
        # Named explicitly: timm 1.0.22 passes the file that it finds in a folder to torch.load, which in older torch
        # versions cannot read safetensors.
        by_name = {"source": "", "file": str(folder / WEIGHTS), "custom_load": False}
        kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), **by_name}
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, cache_dir=cache_dir, **kwargs)
    except RuntimeError as error:  # raised by timm: no weights, unsafe pickles, keys or shapes that do not fit
        raise ValueError(f"{name}: {error}") from error
    if source == "hf-hub":
        model.pretrained_cfg |= {"source": source, "hf_hub_id": location, "file": None}
    else:
        model.pretrained_cfg |= {"source": source, "file": str(folder)}
    return wrap(model, settings.lam, settings.temperature, settings.scores).eval()


def weights_sha256(model: nn.Module) -> str:
    """Compute a hash of the names, shapes, dtypes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(model: nn.Module, folder: Path, name: str, results: Record | Sequence[Record] | None) -> None:
    """Write all three files into an empty folder, and raise an error if `from_pretrained` could not load them."""
    if not is_wrapped(model):
        raise TypeError(f"{describe(model)}: found a {type(model).__name__}, expected a wrapped model: wrap it first.")
    records = [results] if isinstance(results, Mapping) else list(results or ())
    settings = cast(CSRAConfig, model.csra)
    check_supported(model)
    card = model_card(model, settings, name, records, weights_sha256(model) if records else "")
    extra: dict[str, Any] = {"csra": settings.to_dict()}
    cfg = getattr(model, "pretrained_cfg", {})
    if len(cfg.get("label_names") or ()) == model.num_classes:  # timm drops them after reset_classifier
        extra |= {key: cfg[key] for key in LABELS if cfg.get(key)}
    with _contiguous(model):
        timm.models.save_for_hf(model, str(folder), model_config=extra, safe_serialization=True)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # transformers' TimmWrapper reads labels and `num_classes` at the root alone, and fails on a second `num_classes`.
    config.get("model_args", {}).pop("num_classes", None)
    for key in LABELS:
        if (value := config["pretrained_cfg"].pop(key, None)) is not None:
            config.setdefault(key, value)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    config, _ = read_config(folder / CONFIG, describe(model))
    check_weights(describe(model), folder / WEIGHTS, config, saving=True)
    card.save(folder / CARD)


@contextmanager
def _contiguous(model: nn.Module) -> Iterator[None]:
    """Make `state_dict` return contiguous tensors, since safetensors cannot save channels_last tensors."""

    def lay_out(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        state.update({name: tensor.contiguous() for name, tensor in state.items()})

    handle = model.register_state_dict_post_hook(lay_out)
    try:
        yield
    finally:
        handle.remove()


def _parse(name_or_path: str | Path, revision: str | None) -> tuple[str, str]:
    """Return `hf-hub` and `user/repo[@revision]`, `local-dir` and a folder, or `file` and `ARCH@PATH`."""
    text = str(name_or_path)
    source, colon, location = text.partition(":")
    if not colon or source not in ("hf-hub", "local-dir", "file"):
        source, location = ("local-dir" if Path(text).is_dir() else "hf-hub"), text
    if source != "hf-hub":
        if revision is not None:
            what = "file" if source == "file" else "folder"
            raise ValueError(f"{text}: found revision={revision!r} with a {what}; only a repository has revisions.")
        return source, location
    if location.partition("@")[0].count("/") != 1:
        timm_name = f" For timm's model of this name use create_model({text!r})." if is_model(text) else ""
        expected = "expected user/repo on the Hub, an existing folder, or file:ARCH@PATH"
        raise ValueError(f"{text}: found no such folder; {expected}.{timm_name}")
    if revision is not None:
        if "@" in location:
            raise ValueError(f"{text}: found a second revision, revision={revision!r}; give only one of them.")
        location = f"{location}@{revision}"
    return source, location


def _download_weights(name: str, repo: str, commit: str, ours: bool, hub: dict[str, Any]) -> None:
    failed: EntryNotFoundError | None = None
    for file in (WEIGHTS,) if ours else FOREIGN_WEIGHTS:
        try:
            hf_hub_download(repo, file, revision=commit, **hub)
            return
        except EntryNotFoundError as error:
            failed = failed or error
    if isinstance(failed, FileNotFoundError):  # offline, and not in the cache
        raise failed
    raise ValueError(f"{name}: {no_weights(ours)}")
