"""The protocol `agreement`: lam by `timm_csra.choose_lam` on other pictures, without labels."""

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
    """The field `agreement` of a record: lam for this checkpoint and size, by which pictures; or the reason why not.

    Pictures are prepared as the checkpoint and `options` ask, for mosaics too: they show one object each, whatever is
    measured. So one pass serves all cells of a loaded checkpoint for which the same pictures are left.

    Raises:
        DataError: pictures that cannot be read, unless they are to be skipped.
        ValueError: logits that are no numbers.
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
        "spread": list(choice.spread),  # of lam over resamples of the pictures, 95 %
        "images": choice.images,
        "required": choice.required,
        "shares": {f"{lam:g}": share for lam, share in choice.agreement.items()},  # that keep their top class
        "scores": choice.scores,
        "temperature": show_temperature(Setting(choice.lam, choice.temperature, choice.scores)),
        "bad_images": [pictures.name(index) for index in bad],
    }


def setting_of(agreement: Record | None) -> Setting | None:
    """The setting that was chosen, if one was."""
    if agreement is None or agreement["reason"]:
        return None
    temperature = tuple(float(T) for T in agreement["temperature"].split("+"))
    return Setting(agreement["lam"], temperature, agreement["scores"])


def kept_choice(cell: Cell, facts: Record) -> Record | None:
    """What `choose` found when scores were kept.

    Raises:
        DataError: lam is to be chosen by other pictures than then.
    """
    calibration, kept = cell.data.calibration, facts.get("agreement")
    if calibration is None:
        return None
    if kept is None or kept["fingerprint"] != calibration.fingerprint:
        found = f"lam by other pictures, of {kept['data']}" if kept else "no lam chosen without labels"
        raise DataError(
            f"--calibration-data: kept with the scores is {found}; expected one by {calibration.pictures.name}, as it "
            "is now. Run the cell with --keep-scores and these pictures first, or leave them out."
        )
    return dict(kept)
