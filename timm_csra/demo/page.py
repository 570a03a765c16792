"""Lay out the page, and handle its events."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from ..config import LOG_SOFTMAX, LOGITS, SCORES
from ..installed import installed_examples, installed_wheels
from . import parts
from .checkpoints import ONLINE, check_name, checkpoint, is_here, shown_names
from .client import LINK, ON_LINK, ON_SPOKEN, ON_TAG, SETTLE, SPOKEN, WHOLE_PAGE
from .link import MOST_LAM, NO_MAP, TEMPERATURES, UPLOADED, USUAL_LAM, Link, read_link
from .seen import Seen, look
from .told import Refused, answer, note, sentence, warn

MAX_FILE = "25mb"
UPLOADS = (600, 3600)  # in seconds: every ten minutes, uploads older than an hour are deleted
NO_CHECKPOINT = (
    "No checkpoint is installed. Run pip install 'timm-csra[demo]', which brings one, and start the page again; or "
    "choose a checkpoint above: it is downloaded from the Hugging Face Hub."
)
NO_PICTURE = "No example photographs are installed (pip install scikit-image brings some). Upload a picture."
INTRODUCTION = """# Class-specific residual attention
A pretrained classifier scores every location of a picture. Wrapping it adds the spatial maximum of these per-location
scores: `logit = plain logit + lam * attention`. It is meant for pictures with several objects; on many pictures it
changes little, and it can do harm. Logits are for ranking: none of these numbers is a probability.
"""


class _Page:
    """The checkpoints and examples that the page offers, and the handlers of its events.

    Three controls request a forward pass: the checkpoint's name, the example, and a new upload. Everything shown
    comes from its result, `Seen`. `settings` are both lam, whether T is infinite, and T.
    """

    def __init__(self, offered: Mapping[str, Sequence[str]]) -> None:
        self.offered = shown_names(list(offered))
        self.names = {shown: offered[spec] for shown, spec in self.offered.items()}
        self.examples = {Path(path).stem: (label, path) for label, path in installed_examples().items()}
        self.installed = [*self.offered, *installed_wheels()]
        self.checkpoints = [*self.installed, *ONLINE]

    @answer
    def open(self, request: gr.Request) -> tuple[Any, ...]:
        """Show the state of the link, or the first example with the first installed checkpoint. If the checkpoint would
        have to be downloaded, show a button for that instead."""
        link, faults = read_link(request.query_params, self.examples)
        usual = next(iter(self.installed), None)
        name = link.checkpoint or usual
        try:
            check_name(name or "", self.offered)
        except Refused as refused:
            if link.checkpoint:
                faults.append(f"The link's checkpoint is not shown: {refused}")
            name = usual
        for fault in faults:
            warn(fault)
        if link.picture == UPLOADED:
            note("The picture of this link is not part of it. These are its settings on an example.")
        example = link.picture if link.picture in self.examples else next(iter(self.examples), None)
        path = self.examples[example][1] if example else None
        waiting = name if name and name not in self.installed and not is_here(name) else None
        seen, chosen, said = None, (NO_MAP if link.without_map else link.chosen), ""
        if waiting:
            said = f"The link names {name}, which has not been downloaded here. It is downloaded only if you say so."
        elif not name or not path:
            said = NO_PICTURE if name else NO_CHECKPOINT
        else:
            try:
                seen = self.look(name, path)
            except Exception as error:
                said = sentence(error)
        maximum = math.isinf(link.temperature)
        settings = (link.logits, link.log_softmax, maximum, 1.0 if maximum else link.temperature)
        if seen and link.chosen and link.chosen[0] >= len(seen.names):
            warn(
                f"The link has class={link.chosen[0]}; {name} has {len(seen.names)}, numbered from 0. Another map is "
                "shown."
            )
        return (
            usual if waiting else name,
            example if seen else None,
            gr.Button(f"Download {waiting} and show it" if waiting else "", visible=bool(waiting)),
            (waiting, example),
            seen,
            *settings[:3],
            gr.Slider(value=settings[3], interactive=not maximum),
            gr.Accordion(open=not maximum),
            *(self.render(seen, chosen, *settings) if seen else (chosen, *self.nothing(said))),
        )

    def look(self, name: str | None, path: str | None) -> Seen:
        """Run a checkpoint on a picture.

        Raises:
            Refused: the checkpoint cannot be loaded, or the picture cannot be read.
        """
        if not path:
            raise Refused("Choose a picture first: upload one, or take an example.")
        found = checkpoint(name or "", self.offered)
        return look(found, path, found.class_names(self.names.get(found.name, ())))

    @answer
    def asked(
        self, name: str | None, example: str | None, upload: str | None, seen: Seen | None, chosen: Any
    ) -> tuple[Any, ...]:
        """Handle another checkpoint, example or upload. Return the result, the class of the map, and the values of the
        controls as requested and as shown. The class stays the same if the picture and the class names do."""
        new = seen
        try:
            before = seen.path if seen else None
            if upload and upload != before:
                path: str | None = upload
            else:
                path = self.examples[example][1] if example in self.examples else before
            if not seen or (name, path) != (seen.checkpoint.name, before):
                new = self.look(name, path)
        except Exception as error:
            warn(sentence(error))
        if new and seen and chosen != NO_MAP and (new.path != seen.path or new.names != seen.names):
            chosen = None
        shown = [new.checkpoint.name, self.example_of(new)] if new else [next(iter(self.installed), None), None]
        return new, chosen, {"asked": [name, example, upload], "shown": shown}

    def example_of(self, seen: Seen) -> str | None:
        """Return the key of the shown example; None for an upload."""
        return next((key for key, (_, path) in self.examples.items() if path == seen.path), None)

    @answer
    def download(self, waiting: tuple[str | None, str | None], seen: Seen | None) -> tuple[Any, ...]:
        """Handle the button: download the checkpoint of the link and select it, which requests a forward pass."""
        name, example = waiting
        found = checkpoint(name or "", self.offered)
        return found.name, gr.skip() if seen else example, gr.Button(visible=False), found.name

    @answer
    def choose(self, seen: Seen | None, chosen: Any, event: gr.EventData, *settings: Any) -> tuple[Any, ...]:
        """Handle a pressed tag: show its map, or hide it if it is shown."""
        asked = (event.index, event.scores)
        if event.scores not in SCORES or not isinstance(event.index, int):
            raise Refused("A tag of this page is a class and a kind of scores.")
        return self.render(seen, NO_MAP if asked == chosen else asked, *settings)

    @answer
    def render(self, seen: Seen | None, chosen: Any, *settings: Any) -> tuple[Any, ...]:
        """Return all parts that follow from the result: the class of the map, three lists, the picture, the text for
        screen readers, the text on the head, and the link. Without a result, leave the page as it is."""
        if seen is None:
            return tuple(gr.skip() for _ in range(8))
        lam, lam_log_softmax, maximum, temperature = settings
        temperature = math.inf if maximum else temperature
        found = {parts.PLAIN: seen.base}
        for scores, weight in ((LOGITS, lam), (LOG_SOFTMAX, lam_log_softmax)):
            found[scores] = seen.logits(weight, temperature, scores)
        tops = {scores: parts.ranking(logits)[: parts.TOP] for scores, logits in found.items()}
        listed = [(index, LOGITS if scores == parts.PLAIN else scores) for scores, top in tops.items() for index in top]
        if chosen != NO_MAP and (chosen is None or not 0 <= chosen[0] < len(seen.names)):
            chosen = listed[0]
        shown = None if chosen == NO_MAP else tuple(chosen)
        example = self.example_of(seen) or UPLOADED
        link = Link(seen.checkpoint.name, example, lam, lam_log_softmax, temperature, shown, chosen == NO_MAP)
        lists = [parts.tags(seen, scores, logits, shown) for scores, logits in found.items()]
        said = parts.spoken(seen, {scores: top[0] for scores, top in tops.items()}, shown)
        return chosen, *lists, parts.picture(seen, listed, shown), said, parts.head(seen.checkpoint), link.query()

    def nothing(self, said: str) -> tuple[str, ...]:
        """Return the parts of a page without a result: a sentence instead of the picture, and no tags."""
        return "", "", "", parts.message(said), "", "", ""


def build(offered: Mapping[str, Sequence[str]] | None = None) -> gr.Blocks:
    """Lay out the page. `offered` maps the checkpoints to list first to their class names, which may be empty.

    Use `launch` to serve it: fonts and style are given there.
    """
    page = _Page(offered or {})
    with gr.Blocks(title="timm-csra", analytics_enabled=False, delete_cache=UPLOADS) as blocks:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        seen, chosen, waiting, fetched = (gr.State(None) for _ in range(4))
        outcome = gr.JSON(visible="hidden")
        with gr.Row(elem_id="page"):
            with gr.Column(scale=1, min_width=280, elem_id="settings"):
                model = gr.Dropdown(
                    page.checkpoints,
                    value=None,
                    label="Checkpoint",
                    info="Type any timm name or hf-hub:user/repository to download it."
                    + (f" Without network: {', '.join(page.installed)}." if page.installed else ""),
                    allow_custom_value=True,
                    elem_id="model",
                )
                choices = [(label, key) for key, (label, _) in page.examples.items()]
                example = gr.Radio(choices, label="Example photographs", elem_id="examples", visible=bool(choices))
                upload = gr.UploadButton("Upload a picture", file_types=["image"], elem_id="upload")
                download = gr.Button(visible=False, variant="primary", elem_id="download")
                head = gr.HTML(elem_id="head")
            with gr.Column(scale=3, min_width=280, elem_id="results"):
                picture = gr.HTML(elem_id="picture")
                spoken = gr.HTML("", elem_id="spoken", html_template=SPOKEN, js_on_load=ON_SPOKEN)
                with gr.Row(elem_id="lists"):
                    with gr.Column(min_width=180):
                        gr.Markdown("## Plain model\nwithout the attention term", elem_classes="heading")
                        gr.HTML("lam = 0", elem_id="plain-lam")
                        plain = gr.HTML(elem_id="plain", js_on_load=ON_TAG)
                    with gr.Column(min_width=180):
                        gr.Markdown("## logits\nthe paper's", elem_classes="heading")
                        lam, logits = _lam(LOGITS), gr.HTML(elem_id="logits", js_on_load=ON_TAG)
                    with gr.Column(min_width=180):
                        gr.Markdown("## log_softmax\nfor softmax-trained classifiers", elem_classes="heading")
                        lam_log, log_softmax = _lam(LOG_SOFTMAX), gr.HTML(elem_id="log_softmax", js_on_load=ON_TAG)
                gr.Markdown(
                    "Arrows: places gained or lost against plain. Bars: height above the median of all classes, for "
                    "each list on its own. Compare order, not numbers: those of log_softmax fall with lam.",
                    elem_classes="small",
                )
                with gr.Accordion("Advanced: T", open=False, elem_id="advanced") as fold:
                    maximum = gr.Checkbox(True, label="T = infinity: the spatial maximum", elem_id="maximum")
                    temperature = gr.Slider(
                        *TEMPERATURES,
                        value=1,
                        step=0.1,
                        label="T, where finite",
                        info="scores averaged with softmax(T * scores) over the locations",
                        elem_id="temperature",
                    )
                link = gr.HTML("", elem_id="link", html_template=LINK, js_on_load=ON_LINK)
        settings: list[Any] = [lam, lam_log, maximum, temperature]
        rendered = [chosen, plain, logits, log_softmax, picture, spoken, head, link]
        # Without a limit, a visitor does not wait for the downloads of others.
        slow: dict[str, Any] = {"show_progress_on": picture, "concurrency_limit": None, "api_visibility": "private"}
        quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "render", "api_visibility": "private"}
        blocks.load(page.open, None, [model, example, download, waiting, seen, *settings, fold, *rendered], **slow)
        download.click(page.download, [waiting, seen], [model, example, download, fetched], **slow)
        # One event for all requests of a forward pass: of those that arrive while it runs, only the last one follows,
        # with the values that the controls have then.
        looked = gr.on(
            [model.input, example.input, upload.upload, fetched.change],
            page.asked,
            [model, example, upload, seen, chosen],
            [seen, chosen, outcome],
            trigger_mode="always_last",
            **slow,
        )
        controls = [model, example, upload]
        settled = looked.then(None, [outcome, *controls], controls, js=SETTLE, api_visibility="private")
        settled.then(page.render, [seen, chosen, *settings], rendered, **quick)
        changed = [control.input for control in settings]
        changed += [slider.release for slider in (lam, lam_log, temperature)]  # also what the reset button sends
        gr.on(changed, page.render, [seen, chosen, *settings], rendered, trigger_mode="always_last", **quick)
        maximum.input(lambda infinite: gr.Slider(interactive=not infinite), maximum, temperature, **quick)
        for tags in (plain, logits, log_softmax):
            tags.choose(page.choose, [seen, chosen, *settings], rendered, trigger_mode="multiple", **quick)
    return blocks


def _lam(scores: str) -> gr.Slider:
    usual, most = USUAL_LAM[scores], MOST_LAM[scores]
    return gr.Slider(0, most, value=usual, step=usual / 10, label=f"lam, usually {usual:g}", elem_id=f"lam-{scores}")


def launch(offered: Mapping[str, Sequence[str]] | None = None, **options: Any) -> Any:
    """Serve the page; `options` are those of `gradio.Blocks.launch`."""
    subdued = {"body_text_color_subdued": "*neutral_600", "block_info_text_color": "*neutral_600"}
    subdued |= {f"{name}_dark": "*neutral_300" for name in subdued}
    theme = gr.themes.Default(  # fonts of the visitor's own machine: nothing is loaded
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(**subdued)
    given: dict[str, Any] = {"max_file_size": MAX_FILE, "footer_links": ["gradio", "settings"], "ssr_mode": False}
    style, whole_page = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "whole_page.css")
    )
    head = f"<style>{whole_page}</style>"
    return build(offered).launch(theme=theme, css=style, head=head, js=WHOLE_PAGE, **given | options)
