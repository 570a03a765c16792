"""Create the HTML of the page's parts: lists of tags, the picture with a map, the kind of head."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image, ImageDraw
from torch import Tensor

from ..config import LOG_SOFTMAX, LOGITS
from ..trained import SIGMOID, SOFTMAX
from ..visualize import overlay
from .checkpoints import Checkpoint
from .seen import Seen

TOP = 6
PLAIN = "plain"
COLOURS = "inferno"
SCORE_NAMES = {LOGITS: "per-location logits", LOG_SOFTMAX: "per-location log-probabilities"}
_HEADS = {
    "exact": "<b>Linear head after average pooling</b>, as in the paper: the plain logit is the mean of the "
    "per-location logits. Expect gains in ranking on pictures of several objects, none on pictures of one.",
    "nonlinear": "<b>Head with a norm, a hidden layer, an activation or another pooling</b>: the plain logit is not "
    "the mean of the per-location logits. One such head was measured: it gained on mosaics, and lost on photographs of "
    "several objects with logits.",
    "token": "<b>Class token or attention pooling</b>: the patch tokens that are scored here were not trained to be "
    "classified. Maps may be noisy and the ranking may not gain: the plain model is the safe choice.",
}
_LOSSES = {
    SOFTMAX: "<b>Trained with softmax cross entropy.</b> Both kinds of scores apply; on pictures of several objects "
    "log_softmax gained more mAP.",
    SIGMOID: "<b>Trained with a sigmoid for each class.</b> Use logits: log_softmax is not meant for this checkpoint.",
    "": "<b>The loss it was trained with is not known here</b>; its model card may say. log_softmax is meant for "
    "softmax cross entropy alone.",
}
WHY_NOT_LOG_SOFTMAX = (
    "A sigmoid classifier was trained to score every class on its own; log_softmax makes the classes compete at each "
    "location, which such scores were never trained for."
)


def ranking(logits: Tensor) -> list[int]:
    """Return the class indices, sorted by logit, highest first."""
    return logits.argsort(descending=True, stable=True).tolist()


def tags(seen: Seen, scores: str, logits: Tensor, chosen: tuple[int, str] | None) -> str:
    """Return the `TOP` classes as a list of buttons. `scores` is `PLAIN`, or the kind of scores of a wrapped model,
    whose tags also show by how many places they moved from the plain model's list."""
    order, plain_order = ranking(logits), ranking(seen.base)
    plain_places = {index: place for place, index in enumerate(plain_order, 1)}
    top, plain_top = order[:TOP], plain_order[:TOP]
    low, high = float(logits.median()), float(logits.max())
    map_scores = LOGITS if scores == PLAIN else scores
    rows = []
    for place, index in enumerate(top, 1):
        value = float(logits[index])
        share = max(0.0, (value - low) / (high - low)) if high > low else 0.0
        moved = "" if scores == PLAIN else _moved(plain_places[index] - place)
        rows.append(
            f'<li><button type="button" class="tag" data-class="{index}" data-scores="{map_scores}" '
            f'aria-pressed="{str(chosen == (index, map_scores)).lower()}">'
            f'<span class="place">{place}</span><span class="name">{escape(seen.names[index])}</span>'
            f'<span class="logit">{value:.2f}</span>{moved}'
            f'<span class="bar" style="--share:{share:.3f}"></span></button></li>'
        )
    return f'<ol class="tags">{"".join(rows)}</ol><p class="moves">{_summary(seen, scores, order, plain_top)}</p>'


def _moved(up: int) -> str:
    if not up:
        return '<span class="moved">=<span class="spoken"> same place as plain</span></span>'
    arrow, word = ("▲", "up") if up > 0 else ("▼", "down")
    return (
        f'<span class="moved {word}"><span aria-hidden="true">{arrow} {abs(up)}</span>'
        f'<span class="spoken"> {word} {abs(up)} from plain</span></span>'
    )


def _summary(seen: Seen, scores: str, order: Sequence[int], plain_top: Sequence[int]) -> str:
    if scores == PLAIN:
        return "Press a tag to see its map."
    top = order[: len(plain_top)]
    if top == list(plain_top):
        return f"The same {len(top)} tags as plain, in the same order."
    left = [f"{escape(seen.names[index])} is now {order.index(index) + 1}" for index in plain_top if index not in top]
    return f"Out of the first {len(top)}: {'; '.join(left)}." if left else "The same tags as plain, in another order."


def picture(seen: Seen, listed: Sequence[tuple[int, str]], chosen: tuple[int, str] | None) -> str:
    """Return the picture with the map of the chosen class. `listed` are the tags of the page: all maps of one kind of
    scores share a colour scale that covers the maps of these tags."""
    if chosen is None:
        return _figure(seen.picture, "The picture, without a map", "No map. Press a tag to see its map.")
    index, scores = chosen
    maps = seen.maps_of(scores)
    shown = maps[sorted({index} | {other for other, kind in listed if kind == scores})]
    low, high = float(shown.min()), float(shown.max())
    score_map = maps[index]
    rows, columns = score_map.shape
    row, column = divmod(int(score_map.argmax()), columns)
    image = overlay(seen.picture, score_map, low=low, high=high, cmap=COLOURS)
    _mark(image, row, column, rows, columns)
    name, most = escape(seen.names[index]), float(score_map.max())
    where = f"spatial maximum {most:z.2f} at row {row + 1} of {rows}, column {column + 1} of {columns}"
    gradient = ", ".join(to_hex(colormaps[COLOURS](share / 8)) for share in range(9))
    return _figure(
        image,
        f"Map of {seen.names[index]} over the picture: {where}",
        f"<b>{name}</b>: {SCORE_NAMES[scores]}, {where} (outlined)."
        f'<span class="scale"><span>{low:z.1f}</span><span class="colours" style="background:linear-gradient(90deg, '
        f'{gradient})"></span><span>{high:z.1f}</span></span>'
        f'<span class="small">One scale for all tags listed with {scores}.</span>',
    )


def spoken(seen: Seen, first: Mapping[str, int], chosen: tuple[int, str] | None) -> str:
    """Return a plain text for screen readers: the first tag of each list, and which map is shown."""
    tags = "; ".join(f"{scores} {seen.names[index]}" for scores, index in first.items())
    shown = f"Map of {seen.names[chosen[0]]}, {SCORE_NAMES[chosen[1]]}." if chosen else "No map."
    return f"First tags: {tags}. {shown}"


def _mark(image: Image.Image, row: int, column: int, rows: int, columns: int) -> None:
    """Outline one location, in white within black, which is visible on any colour."""
    width, height = image.size
    left, right = round(column * width / columns), round((column + 1) * width / columns) - 1
    top, bottom = round(row * height / rows), round((row + 1) * height / rows) - 1
    right, bottom = max(right, left + 2), max(bottom, top + 2)  # where a location is smaller than its outline
    pen = ImageDraw.Draw(image)
    pen.rectangle((left, top, right, bottom), outline="black", width=5)
    pen.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline="white", width=3)


def _figure(image: Image.Image, alternative: str, caption: str) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    width, height = image.size
    return (
        f'<figure><img src="{source}" width="{width}" height="{height}" alt="{escape(alternative)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def message(text: str) -> str:
    """Return an escaped sentence to show instead of the picture."""
    return f'<p class="message" role="status">{escape(text)}</p>'


def head(checkpoint: Checkpoint) -> str:
    """Return the text about a checkpoint's kind of head, its training loss, and what to expect."""
    found = checkpoint.explanation
    assert found.kind is not None and found.input_size is not None
    _, height, width = found.input_size
    grid = f"{math.prod(found.grid)} locations ({found.grid[0]} x {found.grid[1]})" if found.grid else "no grid"
    return (
        f"<h2>Kind of head</h2><p>{_HEADS[found.kind]}</p><p>{_LOSSES[checkpoint.loss]} {WHY_NOT_LOG_SOFTMAX}</p>"
        f"<p>{escape(checkpoint.name)}: {found.num_classes:,} classes, input {height} x {width}, {grid}. The whole "
        "picture is squashed to that size, nothing is cropped.</p>"
    )
