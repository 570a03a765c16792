"""What a sweep measures: cells (a checkpoint on one data set, task and image size), and how they are run."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from timm_csra.evaluation.scoring import DEFAULT_LOG_SOFTMAX, Setting

from ..checkpoints.find import Checkpoint
from ..data.classes import ClassMap, ClassNames
from ..data.datasets import ImageSet
from ..records.files import Record
from ..records.identity import Identity
from . import software

TASKS = ("single", "real", "multilabel", "mosaic")
SCORE_CLASSES = ("data", "head")  # the classes that the data declares, or all of the head


@dataclass(frozen=True)
class Options:
    """How cells are run; everything here that can change a result is part of a record's key.

    `amp` is a name in `timm_csra.accelerators.AMP`. `channels_last` is the layout of convolutional models.
    `kept_scores` is the folder where scores are kept, if they are; with `rescore` they are read from there.
    `cache_images` is the folder of decoded images, if there is one.
    """

    settings: tuple[Setting, ...]
    crop_mode: str | None = None
    crop_pct: float | None = None
    batch_size: int = 64
    workers: int = 2
    device: str = "cpu"
    amp: str = "none"
    channels_last: bool = False
    seed: int = 0
    activation: str = "softmax"
    average_precision: str = "continuous"
    class_map: ClassMap | None = None
    class_names: ClassNames | None = None
    score_classes: str = SCORE_CLASSES[0]
    skip_bad_images: bool = False
    kept_scores: str | None = None
    rescore: bool = False
    cache_images: str | None = None
    rivals: bool = False
    time_plain: bool = False


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        size: `(H, W)` in pixels, or a multiple of the checkpoint's own that is not known yet.
        requested: the size in the words of the requests that it answers, `1x` or `320`: cells of one request are
            compared with each other, and corrected for it, although the checkpoints' own sizes differ.
        grid: of a mosaic, None for the other tasks.
        test_crop_pct: instead of the checkpoint's own crop_pct, where it is asked for as it is tested.
        own: the checkpoint's own size, None where it could not be asked.
    """

    checkpoint: Checkpoint
    data: ImageSet
    task: str
    size: tuple[int, int] | str
    requested: tuple[str, ...] = ("1x",)
    grid: int | None = None
    test_crop_pct: float | None = None
    own: tuple[int, int] | None = None

    @property
    def task_name(self) -> str:
        """The task, with the grid of a mosaic."""
        return f"{self.task} {self.grid}x{self.grid}" if self.grid else self.task

    @property
    def images(self) -> int:
        """How many the model will see."""
        if not self.grid:
            return len(self.data)
        return len(self.data) // self.grid**2 if self.data.tilings is None else len(self.data.tilings)

    def scored_settings(self, options: Options) -> list[Setting]:
        """Settings whose terms the pass has to score: what lam is chosen without labels, it needs this one's terms."""
        calibration = self.data.calibration
        chosen = calibration is not None and calibration.reason is None
        return [*options.settings, *([DEFAULT_LOG_SOFTMAX] if chosen else [])]

    def five_crops(self, options: Options) -> bool:
        """Whether the plain model also sees five crops of each image: at its own size alone, where they stand for what
        a user may do instead of wrapping."""
        return options.rivals and self.size == self.own and self.grid is None and self.data.stream is None

    def prepared(self, options: Options) -> Options:
        """With the crop of this cell, where none is asked for."""
        return replace(options, crop_pct=options.crop_pct or self.test_crop_pct)

    def preparation(self, options: Options) -> Record:
        """What is asked of timm's preprocessing; all else is the checkpoint's."""
        if self.task == "mosaic":
            cropped = {"crop_mode": "squash", "crop_pct": 1.0}  # the mosaic has the right size already
        else:
            options = self.prepared(options)
            cropped = {"crop_mode": options.crop_mode, "crop_pct": options.crop_pct}
        return {"input_size": (3, *self.size), **cropped}

    def key(self, options: Options) -> Record:
        """Everything that determines the result, with plain JSON values."""
        calibration = self.data.calibration
        # Only where there is one, so that records of sweeps without keep their names.
        calibrated = {"calibration_data": calibration.fingerprint} if calibration else {}
        named = {"class_names": options.class_names.fingerprint} if options.class_names else {}
        scored = {"score_classes": options.score_classes} if options.score_classes != SCORE_CLASSES[0] else {}
        layout = {"channels_last": True} if options.channels_last else {}
        cropped = {"test_crop_pct": self.test_crop_pct} if self.test_crop_pct and not options.crop_pct else {}
        size = self.size if isinstance(self.size, str) else show_size(self.size)
        return {
            "model": self.checkpoint.name,
            "weights": self.checkpoint.fingerprint,
            "data": self.data.name,
            "data_fingerprint": self.data.fingerprint,
            "task": self.task,
            "img_size": size,
            "grid": self.grid,
            "settings": [show_setting(setting) for setting in options.settings],
            "crop_mode": options.crop_mode,
            "crop_pct": options.crop_pct,
            "seed": options.seed,
            "device": torch.device(options.device).type,
            "amp": options.amp,
            "activation": options.activation,
            "average_precision": options.average_precision,
            "class_map": options.class_map.fingerprint if options.class_map else None,
            "skip_bad_images": options.skip_bad_images,
            "kept_scores": "float16" if options.rescore else None,
            "rivals": options.rivals,
            "tf32": software.tf32(options.device),
            "versions": software.versions(*software.PASS),
            "scoring": software.SCORING,
            "evaluation": {"version": software.EVALUATION, **software.versions(*software.ANSWER)},
            **calibrated,
            **named,
            **scored,
            **cropped,
            **layout,
        }

    def identity(self, options: Options) -> Identity:
        return Identity.of(self.key(options))


def show_size(size: tuple[int, int]) -> int | str:
    return size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"


def show_setting(setting: Setting) -> list[Any]:
    """JSON knows no infinity."""
    return [setting.lam, show_temperature(setting), setting.scores]


def show_temperature(setting: Setting) -> str:
    """`1+inf`, as `--temperatures` takes it."""
    return "+".join(f"{temperature:g}" for temperature in setting.temperature)
