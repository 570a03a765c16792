"""The page: which parts it has, and what changes when a visitor does something."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from ..config import LOG_SOFTMAX, LOGITS, SCORES
from ..installed import installed_examples, installed_wheels
from . import parts
from .checkpoints import ONLINE, checkpoint
from .link import MOST_LAM, NO_MAP, TEMPERATURES, UPLOADED, USUAL_LAM, Link, read_link
from .seen import Seen, look

MAX_FILE = "25mb"
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
# What a tag tells the server: its class, and which scores its map is of.
ON_TAG = """element.addEventListener('click', event => {
  const tag = event.target.closest('button.tag');
  if (tag) trigger('choose', {index: Number(tag.dataset.class), scores: tag.dataset.scores});
});"""
LINK = """<label for="link-text">Link to this view</label>
<div class="link"><input id="link-text" readonly value="${value ? '?' + value : ''}">
<button type="button">Copy link</button></div>
<p class="small" role="status"></p>"""
ON_LINK = """const field = element.querySelector('input'), status = element.querySelector('[role=status]');
const update = () => {
  if (!props.value) return;
  history.replaceState(history.state, '', '?' + props.value);
  field.value = location.href;
  status.textContent = new URLSearchParams(props.value).get('picture') === 'uploaded'
    ? 'Your picture is not part of the link: who opens it sees these settings on an example.' : '';
};
watch('value', update);
element.querySelector('button').addEventListener('click', async () => {
  field.select();
  try { await navigator.clipboard.writeText(field.value); status.textContent = 'Copied.'; }
  catch { status.textContent = 'The browser does not let this page copy: the link is selected, press Ctrl+C.'; }
});
update();"""


class _Page:
    """What the page offers, and its answers to a visitor.

    `settings` of the answers are the values of the controls: the checkpoint's name, which example (None for an upload),
    both lam, whether T is infinite, T.
    """

    def __init__(self, offered: Mapping[str, Sequence[str]]) -> None:
        self.offered = offered
        self.examples = {Path(path).stem: (label, path) for label, path in installed_examples().items()}
        self.installed = [*offered, *installed_wheels()]
        self.checkpoints = [*self.installed, *ONLINE]

    def open(self, request: gr.Request) -> tuple[Any, ...]:
        """Show what the link says, or the first example with the first installed checkpoint."""
        link, faults = read_link(request.query_params, self.examples)
        for fault in faults:
            gr.Warning(escape(fault))
        name = link.checkpoint or next(iter(self.installed), None)
        if link.picture == UPLOADED:
            gr.Info("The picture of this link is not part of it. These are its settings on an example.")
        example = link.picture if link.picture in self.examples else next(iter(self.examples), None)
        path = self.examples[example][1] if example else None
        maximum = math.isinf(link.temperature)
        settings = (name, example, link.logits, link.log_softmax, maximum, 1.0 if maximum else link.temperature)
        unlisted = bool(link.checkpoint) and link.checkpoint not in self.checkpoints
        download = gr.Button(f"Download {name} and show it" if unlisted else "", visible=unlisted)
        seen, chosen, said = None, (NO_MAP if link.without_map else link.chosen), ""
        if unlisted:
            said = f"The link names {name}, which this page does not list. It is downloaded only if you say so."
        elif not name or not path:
            said = NO_PICTURE if name else NO_CHECKPOINT
        else:
            try:
                seen = self.look(name, path)
            except gr.Error as error:
                said = error.message
        if seen:
            if link.chosen and link.chosen[0] >= len(seen.names):
                said = f"{escape(seen.checkpoint.name)} has {len(seen.names)}, numbered from 0. Another map is shown."
                gr.Warning(f"The link has class={link.chosen[0]}; {said}")
            return *settings, download, path, seen, *self.render(seen, chosen, *settings)
        return *settings, download, path, None, chosen, *self.nothing(said)

    def look(self, name: str | None, path: str | None) -> Seen:
        """Run the model, once for a picture. Raises gr.Error, which the page shows."""
        if not path:
            raise gr.Error("Choose a picture first: upload one, or take an example.")
        found = checkpoint(name or "", self.offered)
        return look(found, path, found.class_names(self.offered.get(found.name, ())))

    def changed(self, path: str | None, before: Seen | None, chosen: Any, name: str | None) -> tuple[Any, ...]:
        """Answer to another checkpoint. The map stays that of the same class, where it has the same classes."""
        seen = self.look(name, path)
        if before and before.names != seen.names and chosen != NO_MAP:
            chosen = None
        return gr.Button(visible=False), seen, chosen

    def example(self, name: str | None, example: str) -> tuple[Any, ...]:
        """Answer to another example."""
        path = self.examples[example][1]
        return path, self.look(name, path), None

    def upload(self, path: str, name: str | None) -> tuple[Any, ...]:
        """Answer to a picture of the visitor's own: no example is chosen any more."""
        return None, path, self.look(name, path), None

    def choose(self, seen: Seen | None, chosen: Any, event: gr.EventData, *settings: Any) -> tuple[Any, ...]:
        """Answer to a tag: its map, or none where it was shown."""
        asked = (event.index, event.scores)
        if event.scores not in SCORES or not isinstance(event.index, int):
            raise gr.Error("A tag of this page is a class and a kind of scores.")
        return self.render(seen, NO_MAP if asked == chosen else asked, *settings)

    def render(self, seen: Seen | None, chosen: Any, *settings: Any) -> tuple[Any, ...]:
        """Everything that follows from what was seen: which map, three lists, the picture, the head, the link."""
        name, example, lam, lam_log_softmax, maximum, temperature = settings
        if seen is None:
            return chosen, *self.nothing(NO_PICTURE if name else NO_CHECKPOINT)
        temperature = math.inf if maximum else temperature
        found = {parts.PLAIN: seen.base}
        for scores, weight in ((LOGITS, lam), (LOG_SOFTMAX, lam_log_softmax)):
            found[scores] = seen.logits(weight, temperature, scores)
        tops = {scores: parts.ranking(logits)[: parts.TOP] for scores, logits in found.items()}
        listed = [(index, LOGITS if scores == parts.PLAIN else scores) for scores, top in tops.items() for index in top]
        if chosen != NO_MAP and (chosen is None or not 0 <= chosen[0] < len(seen.names)):
            chosen = listed[0]
        shown = None if chosen == NO_MAP else tuple(chosen)
        link = Link(
            seen.checkpoint.name, example or UPLOADED, lam, lam_log_softmax, temperature, shown, chosen == NO_MAP
        )
        lists = [parts.tags(seen, scores, logits, shown) for scores, logits in found.items()]
        return chosen, *lists, parts.picture(seen, listed, shown), parts.head(seen.checkpoint), link.query()

    def nothing(self, said: str) -> tuple[str, ...]:
        """A sentence in the place of the picture, and no tags."""
        return "", "", "", parts.message(said), "", ""


def build(offered: Mapping[str, Sequence[str]] | None = None) -> gr.Blocks:
    """Lay out the page. `offered` are checkpoints to offer first, with the names of their classes, if there are any.

    Use `launch` to serve it: fonts and style are given there.
    """
    page = _Page(offered or {})
    with gr.Blocks(title="timm-csra", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        source, seen, chosen = gr.State(None), gr.State(None), gr.State(None)
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
                with gr.Row(elem_id="lists"):
                    with gr.Column(min_width=230):
                        gr.Markdown("## Plain model\nwithout the attention term", elem_classes="heading")
                        gr.HTML("lam = 0", elem_id="plain-lam")
                        plain = gr.HTML(elem_id="plain", js_on_load=ON_TAG)
                    with gr.Column(min_width=230):
                        gr.Markdown("## logits\nthe paper's", elem_classes="heading")
                        lam, logits = _lam(LOGITS), gr.HTML(elem_id="logits", js_on_load=ON_TAG)
                    with gr.Column(min_width=230):
                        gr.Markdown("## log_softmax\nfor softmax-trained classifiers", elem_classes="heading")
                        lam_log, log_softmax = _lam(LOG_SOFTMAX), gr.HTML(elem_id="log_softmax", js_on_load=ON_TAG)
                gr.Markdown(
                    "Arrows: places gained or lost against plain. Bars: height above the median of all classes, for "
                    "each list on its own. Compare order, not numbers: those of log_softmax fall with lam.",
                    elem_classes="small",
                )
                with gr.Accordion("Advanced: T", open=False, elem_id="advanced"):
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
        settings = [model, example, lam, lam_log, maximum, temperature]
        rendered = [chosen, plain, logits, log_softmax, picture, head, link]
        blocks.load(page.open, None, [*settings, download, source, seen, *rendered])
        # One after the other, each with the values of that moment: what is shown is what the controls say.
        quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "render", "concurrency_limit": 1}
        slow: dict[str, Any] = {"show_progress_on": picture}
        looked = [
            *(
                asked(page.changed, [source, seen, chosen, model], [download, seen, chosen], **slow)
                for asked in (model.input, download.click)
            ),
            example.input(page.example, [model, example], [source, seen, chosen], **slow),
            upload.upload(page.upload, [upload, model], [example, source, seen, chosen], **slow),
        ]
        for event in looked:
            event.success(page.render, [seen, chosen, *settings], rendered, **quick)
        for control in (lam, lam_log, maximum, temperature):
            control.input(page.render, [seen, chosen, *settings], rendered, trigger_mode="always_last", **quick)
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
    return build(offered).launch(theme=theme, css=style, head=head, **given | options)
