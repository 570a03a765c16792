"""A loaded checkpoint, and batches of pictures for it."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from timm.data import create_loader, resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import default_collate

import timm_csra
from timm_csra import Explanation
from timm_csra.hub import weights_sha256

from ..data.datasets import DataError, ImageSet
from ..data.presented import Unlabelled
from ..records.files import Record
from .caching import cache_images
from .cells import Options

if TYPE_CHECKING:
    from .passes import Pass


@dataclass(frozen=True)
class Loaded:
    """A checkpoint built for `size` `(H, W)`, on its device, in eval mode, with results that its cells share.

    Attributes:
        choices: results of `choose` in `agreement.py`, by the pictures and their preprocessing.
        passes: the last pass, by what determines its scores; see `the_pass`.
    """

    model: nn.Module
    size: tuple[int, int]
    choices: dict[tuple[object, ...], Record] = field(default_factory=dict, compare=False)
    passes: dict[str, "Pass"] = field(default_factory=dict, compare=False)

    @cached_property
    def explanation(self) -> Explanation:
        return timm_csra.explain(self.model, self.size)

    @cached_property
    def weights_sha256(self) -> str:
        return weights_sha256(self.model)


def unlabelled(
    pictures: ImageSet,
    loaded: Loaded,
    options: Options,
    bad: list[int],
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Iterator[Tensor]:
    """Yield batches `(N, C, H, W)` of pictures with the checkpoint's preprocessing, without labels.

    Indices of pictures that cannot be read are appended to `bad`.

    Raises:
        DataError: some pictures cannot be read, and `options.skip_bad_images` is false.
    """
    requested = {"input_size": (3, *loaded.size), "crop_mode": options.crop_mode, "crop_pct": options.crop_pct}
    dataset = Unlabelled(pictures)
    config = resolve_input_data_config(loaded.model, args=requested)
    loader = create_loader(
        dataset,
        **config,
        batch_size=options.batch_size,
        num_workers=loaders(options, len(dataset), options.batch_size),
        collate_fn=collate,
        pin_memory=torch.device(options.device).type == "cuda",
        use_prefetcher=False,
    )
    if options.cache_images:
        cache_images(loader, pictures, config, options)
    for images, _ in readable(track(loader), loader, bad):
        yield images
    if bad and not options.skip_bad_images:
        raise DataError(describe_bad_images(loader.dataset, bad))


def loaders(options: Options, images: int, batch_size: int) -> int:
    """Number of processes to read that many images: at most one for each batch."""
    return min(options.workers, math.ceil(images / batch_size))


def collate(samples: list[Any]) -> tuple[Tensor, Any, Any]:
    """Collate images, targets and indices into a batch.

    Only images become a tensor in shared memory: sending the file descriptor of a tensor takes longer than sending a
    few numbers.
    """
    images, targets, index = default_collate(samples)
    return images, targets.numpy(), index.numpy()


def readable(
    batches: Iterable[Any], loader: Any, bad: list[int], read: list[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images that could be read, and their targets.

    Appends their indices to `read`, and the indices of the other images to `bad`.
    """
    for images, *rest in batches:
        targets, index = map(torch.from_numpy, rest)
        good = index >= 0
        bad += (-1 - index[~good]).tolist()
        if read is not None:
            read += index[good].tolist()
        if good.all():
            yield images, targets
        elif good.any():
            yield images[good], targets[good]
    if len(bad) == len(loader.dataset):
        raise DataError(describe_bad_images(loader.dataset, bad))


def describe_bad_images(dataset: Any, bad: list[int]) -> str:
    shown = "; ".join(dataset.why_not(index) for index in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"{len(bad)} of {len(dataset)} images cannot be read: {shown}{more}. Repair or remove them, or skip them "
        "with --skip-bad-images."
    )
