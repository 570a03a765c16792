"""Measuring what lam and T do to a checkpoint: scores in one pass, metrics, paired statistics. Extra `tune`.

`scoring` runs each image once for every setting, `metrics` turns logits into numbers on any `samples` of the images
(`average_precision` and `f1` are the long ones), `statistics` compares settings honestly. Data flows in that order, and
no module here knows where images or checkpoints come from.
"""

from importlib.util import find_spec

for _name in ("torchmetrics", "scipy", "statsmodels"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"timm_csra.evaluation needs {_name}, which is not installed: pip install 'timm-csra[tune]'", name=_name
        )
