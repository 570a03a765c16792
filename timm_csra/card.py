"""Write the model card of a wrapped model: its settings, how to use it with and without timm_csra, and its results."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .config import LOG_SOFTMAX, LOGITS, CSRAConfig
from .errors import describe

Record = Mapping[str, Any]  # what `python -m benchmarks.sweep` writes for a cell

RENAMED = {"recall_at_k": "r_precision"}  # names of metrics in records of earlier versions: old to new

FIXED = ("fixed", "fixed_log_softmax")  # protocols whose settings were fixed before any measurement

# Licences that the Hub knows by an identifier; any other one is given by name.
LICENSES = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "mit", "unknown")

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A [timm](https://github.com/huggingface/pytorch-image-models) image classifier, `{{ architecture }}` with {{ classes }}
classes, wrapped by `timm_csra` with class-specific residual attention
([Zhu & Wu, ICCV 2021](https://arxiv.org/abs/2108.02456)): the classifier also scores every location of the last feature
map, and lam times an attention-weighted mean of these scores (at T = inf, their maximum) is added to each logit. The
weights are those of the plain model; nothing was retrained.

| setting | value |
|---|---|
| lam | {{ lam }} |
| temperature T | {{ temperature }} |
| scores | {{ scores }} |

## Use

```python
import timm_csra

model = timm_csra.from_pretrained({{ name_literal }})  # in eval mode; model.csra.lam = 0 is the plain model
```

Without timm_csra, the plain model:

```python
import timm

model = timm.create_model({{ timm_literal }}, pretrained=True).eval()
```

{{ reading }}

## Origin

{{ origin }}

{{ license_text }}
{{ measured }}"""


READING = {
    LOGITS: "Logits grow by a factor of about 1 + lam: use them to rank classes. Probabilities computed from them are\n"
    "not calibrated like those of the plain model.",
    LOG_SOFTMAX: "lam times a log-probability, which is at most 0, is added to each logit: use the logits to rank\n"
    "classes, and do not compare them with a threshold.",
}


def model_card(model: nn.Module, settings: CSRAConfig, name: str, records: Sequence[Record], weights: str) -> ModelCard:
    """Create the card of a wrapped model.

    Args:
        model: a wrapped model.
        settings: settings of the model.
        name: the repository or folder that the model will be loaded from.
        records: finished records of a sweep for this model.
        weights: hash of the model's weights, see `weights_sha256`.

    Raises:
        ValueError: a record is not finished, or was measured with other weights.
    """
    for record in records:
        _check_record(record, weights)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    base = str(cfg.get("hf_hub_id") or "").partition("@")[0] or None
    if base == name:
        base = None  # the model is pushed to the repository that it was loaded from
    licence = cfg.get("license") or "unknown"
    known = licence in LICENSES
    local = "/" not in name or name.startswith((".", "/", "~")) or name.count("/") != 1
    data = ModelCardData(
        license=licence if known else "other",
        license_name=None if known else licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "timm_csra"],
        base_model=base,
        model_name=name if records else None,
        eval_results=[result for record in records for result in _eval_results(record, settings)] or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        architecture=describe(model),
        classes=model.num_classes,
        lam=f"{settings.lam:g}",
        temperature=_heads(settings),
        scores=settings.scores,
        reading=READING[settings.scores],
        name_literal=repr(name),
        timm_literal=repr(f"{'local-dir' if local else 'hf-hub'}:{name}"),
        origin=f"Base checkpoint, as the model's `pretrained_cfg` names it: `{base}`."
        if base
        else "The base checkpoint is unknown: the model's `pretrained_cfg` names none.",
        license_text="The licence is unknown: the checkpoint does not state one."
        if licence == "unknown"
        else f"The licence is the checkpoint's: {licence}.",
        measured=_measured(records, settings) if records else "",
    )


def _heads(settings: CSRAConfig) -> str:
    """Format the temperatures like `--temperatures` of the sweep and its records, such as `1+inf`."""
    return "+".join(f"{temperature:g}" for temperature in settings.temperatures)


def _check_record(record: Record, weights: str) -> None:
    if not isinstance(record, Mapping) or record.get("status") != "ok":
        found = f"status {record.get('status')!r}" if isinstance(record, Mapping) else f"a {type(record).__name__}"
        raise ValueError(f"results: found {found}; expected finished records of python -m benchmarks.sweep.")
    if record["weights_sha256"] != weights:
        raise ValueError(
            f"results: the record of {record['model']} on {record['data']} was measured with other weights than those "
            "of this model. Give records that were measured with the same weights."
        )


def results_of(record: Record) -> list[dict[str, Any]]:
    """Return the results of a record in the form of this version.

    Records of earlier versions do not name the kind of scores (always logits), have another name for a metric, and do
    not contain how many images count for a metric: `n` is None where that may differ from the record's `n`.
    """
    return [_as_today(record, row) for row in record["results"]]


def _as_today(record: Record, row: Record) -> dict[str, Any]:
    settings = [lam for lam in row["lam"].split(";") if lam]  # empty for a rival, which has no lam
    metric = RENAMED.get(row["metric"], row["metric"])
    all_count = record["task"] == "single" or metric not in ("top1", "lrap", "r_precision")
    before = {"scores": ";".join([LOGITS] * len(settings)), "n": record["n"] if all_count else None}
    return {**before, **row, "metric": metric}


def _rows(record: Record, settings: CSRAConfig) -> list[dict[str, Any]]:
    """Select the results for the card: `crossfit`, which chooses settings itself, and the fixed protocols whose
    settings are the model's."""
    own = (f"{settings.lam:g}", _heads(settings), settings.scores)
    return [
        row
        for row in results_of(record)
        if row["gain"] is not None
        and (
            row["protocol"] == "crossfit"
            or (row["protocol"] in FIXED and (row["lam"], row["temperature"], row["scores"]) == own)
        )
    ]


def _eval_results(record: Record, settings: CSRAConfig) -> list[EvalResult]:
    where = {
        "task_type": "image-classification",
        "dataset_type": record["data"],
        "dataset_name": f"{_where(record)}, {record['img_size']} px, {record['n']} pictures",
    }
    results: dict[str, EvalResult] = {}
    for row in _rows(record, settings):
        metric = row["metric"]
        plain, wrapped = f"{metric}, plain", f"{metric}, wrapped, {row['protocol']}"
        results[plain] = EvalResult(**where, metric_type=metric, metric_name=plain, metric_value=row["baseline"])
        names = ("protocol", "n", "scores", "lam", "temperature", "gain", "ci_low", "ci_high")
        facts = {name: row[name] for name in names}
        results[wrapped] = EvalResult(
            **where, metric_type=metric, metric_name=wrapped, metric_value=row["value"], metric_args=facts
        )
    return list(results.values())


def _where(record: Record) -> str:
    over = ", all classes of the head" if record.get("score_classes") == "head" else ""
    return f"{record['data']}, {record['task']}{over}"


def _measured(records: Sequence[Record], settings: CSRAConfig) -> str:
    lines = [
        "",
        "## Measured",
        "",
        "Measured by `python -m benchmarks.sweep` of timm_csra: metrics in percent, and gains over the plain model in",
        "percentage points with 95 % paired bootstrap confidence intervals over pictures. `fixed` (logits, lam 0.1,",
        "T inf) and `fixed_log_softmax` (lam 0.3, T inf) are listed where they are this model's settings; they were",
        "not chosen on these pictures. `crossfit`: the setting is chosen on one half of the pictures and measured on",
        "the other half, both ways (both settings are listed). n is the number of pictures that the metric counts.",
        "",
        "| data, task | pixels | n | metric | protocol | scores | lam | T | plain | wrapped | gain |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for row in _rows(record, settings):
            interval = "" if row["ci_low"] is None else f" [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
            cells = [_where(record), record["img_size"], _known(row["n"])]
            cells += [row[name] for name in ("metric", "protocol", "scores", "lam", "temperature")]
            cells += [f"{row['baseline']:.2f}", f"{row['value']:.2f}", f"{row['gain']:+.2f}{interval}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def _known(count: int | None) -> int | str:
    return "-" if count is None else count
