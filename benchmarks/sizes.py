"""Turn the requests of `--img-size` into pixels for each checkpoint."""

from .checkpoints.find import Checkpoint
from .records.shape import REQUEST

TEST = "test"


def own_size(model: Checkpoint, missing: dict[Checkpoint, str]) -> tuple[int, int] | None:
    """Return the checkpoint's own size `(H, W)`, or None if its configuration cannot be read."""
    if model in missing and model.source == "hf-hub":
        return None
    try:
        return model.input_size()
    except Exception:  # run_cell asks again and records the reason
        return None


def sizes_of(
    model: Checkpoint, requests: str, missing: dict[Checkpoint, str], crop_pct: float | None
) -> dict[tuple[tuple[int, int] | str, float | None], tuple[str, ...]]:
    """Parse `1x,320,test` into sizes and crops, see `size_of`, each with the requests for it.

    If the checkpoint's configuration cannot be read, the requests take the place of the sizes.
    """
    parts = list(dict.fromkeys(part.strip() for part in requests.split(",")))
    if model in missing and model.source == "hf-hub":
        return {(part, None): (part,) for part in parts}
    sizes: dict[tuple[tuple[int, int] | str, float | None], tuple[str, ...]] = {}
    for part in parts:
        try:
            size, test_crop = size_of(model, part)
        except Exception:  # run_cell asks again and records the reason
            return {(part, None): (part,) for part in parts}
        pixels = size, None if crop_pct else test_crop
        sizes[pixels] = (*sizes.get(pixels, ()), part)
    return sizes


def size_of(model: Checkpoint, request: str) -> tuple[tuple[int, int], float | None]:
    """Return the size `(H, W)` of `320`, `2x` or `test`, and for `test` the crop_pct, see `test_input`, else None."""
    if request == TEST:
        return model.test_input()
    if not request.endswith("x"):
        return (int(request), int(request)), None
    height, width = (round(float(request[:-1]) * side) for side in model.input_size())
    return (height, width), None


def check_sizes(requests: str) -> None:
    """Raise ValueError if `requests` is not a comma-separated list of sizes."""
    if any(not REQUEST.fullmatch(part.strip()) for part in requests.split(",")):
        raise ValueError(f"--img-size: found {requests!r}; expected pixels, multiples or test, such as 224 or 1x,2x.")
