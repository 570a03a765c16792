"""Choose the calibration pictures for each data set: those of `--calibration-data` that are not among its images."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from timm_csra.pictures import in_rgb

from .datasets import Calibration, DataError, ImageSet

SIDE = 16  # pixels of a thumbnail
# Thumbnails with a smaller root mean square difference, on a scale of 255, count as the same picture. Copies of 150
# photographs in other sizes, aspect ratios and JPEG qualities differ by up to 7.5; any two of 1,363 different
# photographs differ by at least 20. Leaving out one picture too many costs little.
SAME = 10.0
BATCH = 256  # thumbnails compared at a time


def with_calibration(data: Sequence[ImageSet], pictures: ImageSet) -> list[ImageSet]:
    """Return the data sets with all calibration pictures; a stream gets the reason why it has none."""
    reason = "a stream has no list of its pictures to compare the calibration pictures with"
    fingerprint = pictures.fingerprint
    return [
        replace(images, calibration=Calibration(pictures, fingerprint, reason=reason if images.stream else None))
        for images in data
    ]


def without_measured(data: Sequence[ImageSet]) -> list[ImageSet]:
    """Leave out calibration pictures that are also among the images of their data set, whatever their file names.

    Thumbnails are compared, which finds copies of another size or compression. Every picture is read once, at low
    resolution where its format allows. Pictures that cannot be read match none; the pass that uses them reports them.
    """
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
        reason = None if len(kept) else f"all {len(pictures)} pictures of {pictures.name} are among those measured"
        compared.append(replace(images, calibration=Calibration(kept, calibration.fingerprint, names, reason)))
    return compared


def _among(thumbnails: NDArray[np.float32], images: ImageSet) -> NDArray[np.bool_]:
    """Return for each thumbnail `(n, SIDE * SIDE * 3)` whether it is one of the images, `(n,)`."""
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
    """Yield index and thumbnail `(SIDE * SIDE * 3,)` of every picture that can be read."""
    for index in range(len(images)):
        try:
            with images.opened(index) as image:
                image.draft("RGB", (4 * SIDE, 4 * SIDE))  # JPEG decodes much faster at low resolution
                small = in_rgb(image).resize((SIDE, SIDE), Image.Resampling.BOX)
        except DataError:
            continue
        yield index, np.asarray(small, dtype=np.float32).ravel()
