"""Measure the effect of lam and T on a checkpoint: scores in one pass, metrics, paired statistics. Extra `tune`.

`scoring` runs the model once on each image for all settings, `metrics` computes metrics from logits on any `samples` of
the images (the longer ones are in `average_precision` and `f1`), `statistics` compares settings with the plain model,
and `tuning` chooses a setting by cross-validation. Data flows in that order, and no module here knows where images or
checkpoints come from.
"""

from importlib.util import find_spec

for _name in ("torchmetrics", "scipy", "statsmodels"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"timm_csra.evaluation needs {_name}, which is not installed: pip install 'timm-csra[tune]'", name=_name
        )
