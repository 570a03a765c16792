"""Convert the state of the page to the query of a link, and back; every value of a link is validated."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from ..config import LOG_SOFTMAX, LOGITS, SCORES
from .told import quoted

UPLOADED = "uploaded"  # stands for an uploaded picture, which is not part of the link
NO_MAP = "none"
USUAL_LAM = {LOGITS: 0.1, LOG_SOFTMAX: 0.3}
MOST_LAM = {LOGITS: 1.0, LOG_SOFTMAX: 3.0}  # of the sliders: the usual lam is at a tenth of each
TEMPERATURES = (0.1, 20.0)


@dataclass(frozen=True)
class Link:
    """The state of the page in a link.

    Attributes:
        checkpoint: name of the checkpoint; "" for the first on the page.
        picture: key of an example, or `UPLOADED`; "" for the first on the page.
        logits: lam for logits.
        log_softmax: lam for log-probabilities.
        temperature: T.
        chosen: index of the class whose map is shown, and the kind of scores; None for the first tag.
        without_map: whether no map is shown over the picture.
    """

    checkpoint: str = ""
    picture: str = ""
    logits: float = USUAL_LAM[LOGITS]
    log_softmax: float = USUAL_LAM[LOG_SOFTMAX]
    temperature: float = math.inf
    chosen: tuple[int, str] | None = None
    without_map: bool = False

    def query(self) -> str:
        """Return the query, without its question mark."""
        said: dict[str, str] = {"checkpoint": self.checkpoint, "picture": self.picture}
        said |= {f"lam_{scores}": f"{getattr(self, scores):g}" for scores in SCORES}
        said["T"] = f"{self.temperature:g}"
        if self.without_map:
            said["class"] = NO_MAP
        elif self.chosen:
            said |= {"class": str(self.chosen[0]), "scores": self.chosen[1]}
        return urlencode({name: value for name, value in said.items() if value})


def read_link(query: Mapping[str, str], pictures: Iterable[str]) -> tuple[Link, list[str]]:
    """Read a query. Invalid values are replaced by the defaults, and the returned sentences name them.

    Example:
        >>> link, faults = read_link({"lam_logits": "0.2", "T": "-1"}, ())
        >>> link.logits, link.temperature, faults
        (0.2, inf, ["The link has T='-1'; expected inf, or a number from 0.1 to 20. Shown with inf."])
    """
    faults: list[str] = []
    query = {name: value.strip() for name, value in query.items() if value.strip()}

    def read(name: str, usual: float, low: float, high: float) -> float:
        try:
            value = math.nan if "_" in query.get(name, "") else float(query.get(name, usual)) + 0.0  # no -0
        except ValueError:
            value = math.nan
        if low <= value <= high or value == usual:
            return value
        expected = f"{'inf, or ' if math.isinf(usual) else ''}a number from {low:g} to {high:g}"
        faults.append(f"The link has {name}={quoted(query[name])}; expected {expected}. Shown with {usual:g}.")
        return usual

    lams = {scores: read(f"lam_{scores}", USUAL_LAM[scores], 0, most) for scores, most in MOST_LAM.items()}
    temperature = read("T", math.inf, *TEMPERATURES)
    picture, known = query.get("picture", ""), {UPLOADED, *pictures}
    if picture and picture not in known:
        faults.append(
            f"The link has picture={quoted(picture)}; expected {' or '.join(sorted(known))}. Another is shown."
        )
        picture = ""
    chosen, without_map = query.get("class", ""), query.get("class") == NO_MAP
    if chosen and not without_map and not (chosen.isascii() and chosen.isdigit() and len(chosen) < 10):
        faults.append(f"The link has class={quoted(chosen)}; expected its index. Another map is shown.")
        chosen = ""
    scores = query.get("scores", LOGITS)
    if scores not in SCORES:
        faults.append(f"The link has scores={quoted(scores)}; expected {' or '.join(SCORES)}. Shown with {LOGITS}.")
        scores = LOGITS
    return Link(
        checkpoint=query.get("checkpoint", ""),
        picture=picture,
        **lams,
        temperature=temperature,
        chosen=(int(chosen), scores) if chosen and not without_map else None,
        without_map=without_map,
    ), faults
