"""Which pictures lam is chosen by without labels: those given, but for what also stands among the pictures measured."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from timm_csra.pictures import in_rgb

from .datasets import Calibration, DataError, ImageSet

SIDE = 16  # pixels of a thumbnail
# Root mean square difference of two thumbnails, of 255. Copies of 150 photographs in other sizes, shapes and qualities
# of JPEG differ by up to 7.5, and no two different ones of 1,363 by less than 20. One left out too many costs little.
SAME = 10.0
BATCH = 256  # thumbnails that are compared at a time


def with_calibration(data: Sequence[ImageSet], pictures: ImageSet) -> list[ImageSet]:
    """The data with all of the pictures to choose lam by; a stream with the reason why not."""
    reason = "a stream has no list of its pictures, so that those given cannot be told from them"
    fingerprint = pictures.fingerprint
    return [
        replace(images, calibration=Calibration(pictures, fingerprint, reason=reason if images.stream else None))
        for images in data
    ]


def without_measured(data: Sequence[ImageSet]) -> list[ImageSet]:
    """Leave out the pictures of each calibration that also stand among the data which it goes with, whatever the names:
    by thumbnails, so that copies in another size or compression are found. Every picture is read once, at low
    resolution where its format allows; what cannot be read is like nothing, and told of where it is used."""
    seen: dict[int, tuple[list[int], NDArray[np.float32]]] = {}
    compared = []
    for images in data:
        calibration = images.calibration
        if calibration is None or calibration.reason:
            compared.append(images)
            continue
        pictures = calibration.pictures
        if id(pictures) not in seen:
            found = list(_thumbnails(pictures))
            every = np.array([thumbnail for _, thumbnail in found], np.float32)
            seen[id(pictures)] = [index for index, _ in found], every.reshape(-1, SIDE * SIDE * 3)
        indices, thumbnails = seen[id(pictures)]
        same = {indices[i] for i in np.flatnonzero(_among(thumbnails, images))}
        kept = pictures.some([i for i in range(len(pictures)) if i not in same])
        names = tuple(str(pictures.paths[i]) for i in sorted(same))
        reason = None if len(kept) else f"all {len(pictures)} pictures of {pictures.name} stand among those measured"
        compared.append(replace(images, calibration=Calibration(kept, calibration.fingerprint, names, reason)))
    return compared


def _among(thumbnails: NDArray[np.float32], images: ImageSet) -> NDArray[np.bool_]:
    """Which of the thumbnails `(n, SIDE * SIDE * 3)` the images have too, `(n,)`."""
    found = np.zeros(len(thumbnails), bool)
    squares = (thumbnails**2).sum(axis=1)
    batch: list[NDArray[np.float32]] = []

    def compare() -> None:
        others = np.stack(batch)
        distances = squares[:, None] + (others**2).sum(axis=1) - 2 * thumbnails @ others.T  # squared
        found[:] |= (distances < SAME**2 * thumbnails.shape[1]).any(axis=1)
        batch.clear()

    for _, thumbnail in _thumbnails(images):
        batch.append(thumbnail)
        if len(batch) == BATCH:
            compare()
    if batch:
        compare()
    return found


def _thumbnails(images: ImageSet) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Index and thumbnail `(SIDE * SIDE * 3,)` of every picture that can be read."""
    for index in range(len(images)):
        try:
            with images.opened(index) as image:
                image.draft("RGB", (4 * SIDE, 4 * SIDE))  # JPEG decodes a fraction of the resolution, much faster
                small = in_rgb(image).resize((SIDE, SIDE), Image.Resampling.BOX)
        except DataError:
            continue
        yield index, np.asarray(small, dtype=np.float32).ravel()
