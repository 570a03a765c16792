"""The protocol `agreement`: `timm_csra.choose_lam` chooses lam on other pictures, without labels."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import timm_csra
from timm_csra.accelerators import autocast
from timm_csra.evaluation.scoring import Setting

from ..data.datasets import Calibration, DataError
from ..data.presented import Unlabelled
from ..records.files import Record
from .cells import Cell, Options, show_temperature
from .loading import Loaded, unlabelled


def choose(
    calibration: Calibration | None,
    loaded: Loaded,
    options: Options,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Record | None:
    """Choose lam for a checkpoint and size, and return the record's field `agreement`; None without `calibration`.

    The field has the chosen lam and the pictures, or the reason why no lam was chosen. The calibration pictures show
    one object each and are never tiled into mosaics, so one pass serves all cells of a loaded checkpoint that use the
    same pictures.

    Raises:
        DataError: pictures cannot be read, and `options.skip_bad_images` is false.
        ValueError: logits are NaN or infinite.
    """
    if calibration is None:
        return None
    about: Record = {
        "data": calibration.pictures.name,
        "fingerprint": calibration.fingerprint,
        "left_out": list(calibration.left_out),
        "reason": calibration.reason,
    }
    if calibration.reason:
        return about
    prepared = (options.crop_mode, options.crop_pct, options.amp, options.skip_bad_images)
    key = (calibration.fingerprint, calibration.left_out, *prepared)
    if key not in loaded.choices:
        loaded.choices[key] = _choose(calibration, loaded, options, track)
    return about | loaded.choices[key]


def _choose(
    calibration: Calibration, loaded: Loaded, options: Options, track: Callable[[Iterable[Any]], Iterable[Any]]
) -> Record:
    pictures = Unlabelled(calibration.pictures)
    bad: list[int] = []
    with autocast(options.device, options.amp):
        choice = timm_csra.choose_lam(
            loaded.model, unlabelled(calibration.pictures, loaded, options, bad, track), temperature=math.inf
        )
    return {
        "lam": choice.lam,
        "spread": list(choice.spread),  # 95 % bootstrap interval of lam
        "images": choice.images,
        "required": choice.required,
        "shares": {f"{lam:g}": share for lam, share in choice.agreement.items()},  # keep their top class
        "scores": choice.scores,
        "temperature": show_temperature(Setting(choice.lam, choice.temperature, choice.scores)),
        "bad_images": [pictures.name(index) for index in bad],
    }


def setting_of(agreement: Record | None) -> Setting | None:
    """Return the chosen setting, or None if none was chosen."""
    if agreement is None or agreement["reason"]:
        return None
    temperature = tuple(float(T) for T in agreement["temperature"].split("+"))
    return Setting(agreement["lam"], temperature, agreement["scores"])


def kept_choice(cell: Cell, facts: Record) -> Record | None:
    """Return the result of `choose` that was kept with the scores.

    Raises:
        DataError: the calibration pictures are not those of the kept result.
    """
    calibration, kept = cell.data.calibration, facts.get("agreement")
    if calibration is None:
        return None
    if kept is None or kept["fingerprint"] != calibration.fingerprint:
        found = f"lam chosen on other pictures, of {kept['data']}" if kept else "no lam chosen without labels"
        raise DataError(
            f"--calibration-data: found {found} with the kept scores; expected lam chosen on the present pictures of "
            f"{calibration.pictures.name}. Run the cell with --keep-scores and these pictures first, or leave them out."
        )
    return dict(kept)
