"""The cells that a sweep measures (a checkpoint on one data set, task and image size), and the options of a run."""

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
    """How cells are run. Every option that can change a result is part of a record's key.

    `amp` is a name in `timm_csra.accelerators.AMP`. `channels_last` is the memory format of convolutional models.
    `kept_scores` is the folder to keep scores in, or with `rescore` to read them from. `cache_images` is the folder of
    decoded images. Both are None if unused.
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
    """A checkpoint on one data set, task and image size.

    Attributes:
        size: `(H, W)` in pixels; or a request such as `2x` if the checkpoint's own size is unknown.
        requested: the requests of `--img-size` that give this size, such as `1x` or `320`. Cells of one request are
            compared with each other and corrected together, although the checkpoints' own sizes differ.
        grid: mosaics are `grid` x `grid` photographs; None for the other tasks.
        test_crop_pct: the crop_pct at which timm validates the checkpoint, for the request `test`; else None.
        own: the checkpoint's own size `(H, W)`; None if it is unknown.
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
        """The task, followed by the grid of a mosaic."""
        return f"{self.task} {self.grid}x{self.grid}" if self.grid else self.task

    @property
    def images(self) -> int:
        """Number of images that the model runs."""
        if not self.grid:
            return len(self.data)
        return len(self.data) // self.grid**2 if self.data.tilings is None else len(self.data.tilings)

    def scored_settings(self, options: Options) -> list[Setting]:
        """Settings whose attention terms the pass computes. Any lam chosen without labels uses those of the default."""
        calibration = self.data.calibration
        chosen = calibration is not None and calibration.reason is None
        return [*options.settings, *([DEFAULT_LOG_SOFTMAX] if chosen else [])]

    def five_crops(self, options: Options) -> bool:
        """Whether the plain model also runs on five crops of each image, as an alternative to wrapping.

        Only at the checkpoint's own size, and not for mosaics and streams.
        """
        return options.rivals and self.size == self.own and self.grid is None and self.data.stream is None

    def prepared(self, options: Options) -> Options:
        """Return the options with the cell's crop_pct, unless they have one."""
        return replace(options, crop_pct=options.crop_pct or self.test_crop_pct)

    def preparation(self, options: Options) -> Record:
        """Return the arguments for timm's data config; the checkpoint's configuration determines the rest."""
        if self.task == "mosaic":
            cropped = {"crop_mode": "squash", "crop_pct": 1.0}  # the mosaic has the right size already
        else:
            options = self.prepared(options)
            cropped = {"crop_mode": options.crop_mode, "crop_pct": options.crop_pct}
        return {"input_size": (3, *self.size), **cropped}

    def key(self, options: Options) -> Record:
        """Return everything that determines the result, as plain JSON values."""
        calibration = self.data.calibration
        # The names below were added later: they are absent by default, so that file names of older records stay valid.
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
    """A setting as JSON values; an infinite T, which JSON cannot express, is text."""
    return [setting.lam, show_temperature(setting), setting.scores]


def show_temperature(setting: Setting) -> str:
    """Format T as `--temperatures` takes it, such as `1+inf`."""
    return "+".join(f"{temperature:g}" for temperature in setting.temperature)
