"""lam without labels, against wrapped models run one lam at a time, and pictures whose top class changes on cue."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import binom
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import timm_csra
from timm_csra.agreement import LAMS, LamChoice, _largest, _spread, choose_lam

from .families import FAMILIES, Family, create, images
from .test_package import EXTRAS, python

QUICK = ("test_resnet", "test_convnext", "test_mambaout", "test_vit2", "pit_ti_224")


class Pooled(nn.Module):
    """A classifier whose pictures are its location scores: `(N, K, rows, columns)`."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward_features(self, x: Tensor) -> Tensor:
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3)) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def changing(*above: float) -> Tensor:
    """For each lam a picture whose top class changes above it (T = inf, of logits): class 0 has base 1 and highest
    score 1, class 1 has base 1 - lam and highest score 2."""
    return torch.tensor([[[[1.0, 1.0]], [[2.0, -2 * lam]]] for lam in above])


def chosen(pictures: Any, agreement: float = 0.98, lams: Any = (0.1, 0.3, 1), **settings: Any) -> LamChoice:
    """`choose_lam` of `Pooled` on logits, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = [pictures] if isinstance(pictures, Tensor) else pictures
        return choose_lam(Pooled().eval(), loader, agreement, lams, **{"scores": "logits"} | settings)


def literal(plain: nn.Module, batches: list[Tensor], lams: Any, *settings: Any) -> dict[float, float]:
    """Shares of pictures that keep their top class in a model that is wrapped for each lam."""
    shares = {}
    timm_csra.unwrap(plain)
    with torch.no_grad():
        before = torch.cat([plain(x) for x in batches])
        for lam in lams:
            after = torch.cat([timm_csra.wrap(plain, lam, *settings)(x) for x in batches])
            shares[lam] = (before.argmax(1) == after.argmax(1)).float().mean().item()
    timm_csra.unwrap(plain)
    return shares


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f.name in QUICK else pytest.mark.slow, id=f.name)
        for f in FAMILIES
        if f.name in (*QUICK, "deit_tiny_distilled_patch16_224", "resnet50_clip", "efficientvim_m1")
    ],
)
@pytest.mark.parametrize("scores", ["logits", "log_softmax"])
@pytest.mark.parametrize("temperature", [math.inf, (1.0, 20.0)], ids=str)
@pytest.mark.filterwarnings("ignore:.*(pictures, too few|the largest tried)")
def test_agreement_is_that_of_wrapped_models(family: Family, scores: str, temperature: Any) -> None:
    batches, lams = [images(family, 6, seed) for seed in (0, 1)], (0.1, 1, 8, 100)
    expected = literal(create(family.name), batches, lams, temperature, scores)
    for model in (create(family.name), timm_csra.wrap(create(family.name), 0.7, 3)):
        choice = choose_lam(model, batches, 0.5, lams, temperature, scores)
        assert choice.agreement == pytest.approx(expected)
        passed = [lam for lam in lams if all(expected[smaller] >= 0.5 for smaller in lams if smaller <= lam)]
        assert choice.lam == max(passed, default=0)
        assert choice.images == 12


def test_the_choice_on_pictures_that_change_on_cue() -> None:
    pictures = changing(0.05, *[0.2] * 2, *[0.5] * 7)
    assert chosen(pictures, 0.9).lam == 0.1
    assert chosen(pictures, 0.9).agreement == {0.1: 0.9, 0.3: 0.7, 1: 0}
    assert chosen(pictures, 0.7).lam == 0.3
    assert chosen(pictures, 1).lam == 0
    assert chosen(pictures, 0.7, [1, 0.1, 0.3]) == chosen(pictures, 0.7)
    assert tuple(chosen(pictures, lams=None).agreement) == LAMS == (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 4, 8)


@pytest.mark.parametrize("size", [1, 2, 5, 10])
def test_order_and_batch_size_do_not_matter(size: int) -> None:
    pictures = changing(0.05, *[0.2] * 2, *[0.5] * 7)
    shuffled = pictures[torch.randperm(10, generator=torch.Generator().manual_seed(size))]
    assert chosen(list(shuffled.split(size)), 0.7) == chosen(pictures, 0.7)


def test_whatever_comes_with_the_images_is_not_looked_at() -> None:
    pictures = changing(0.2, 0.5)
    for batches in (
        [(pictures, "labels")],
        [[pictures]],
        [(pictures[:1], None, 3), pictures[1:]],
        [pictures[:0], pictures],
    ):
        assert chosen(batches) == chosen(pictures)


# Agreement at lam 0.1, 0.3, 1 of 50 pictures, the share asked for, the choice.
COUNTS = [
    ((50, 50, 50), 1.0, 1),
    ((50, 49, 49), 1.0, 0.1),
    ((50, 49, 48), 0.98, 0.3),
    ((48, 49, 50), 0.98, 0),  # what comes after a lam that fails does not matter
    ((50, 48, 50), 0.98, 0.1),
    ((1, 0, 0), 1e-9, 0.1),  # a share above 0 is at least one picture
    ((0, 0, 0), 1e-9, 0),
]


@pytest.mark.parametrize(("counts", "required", "lam"), COUNTS)
def test_the_largest_that_passes_with_all_smaller_ones(counts: Any, required: float, lam: float) -> None:
    assert _largest(np.array(counts), 50, (0.1, 0.3, 1), required) == lam


def test_thresholds_are_exact() -> None:
    for n in range(1, 201):
        for k in range(1, n + 1):
            counts = np.array([[k], [k - 1]])
            assert _largest(counts, n, (0.3,), k / n).tolist() == [0.3, 0]
    for percent in range(1, 101):
        counts = np.array([[7 * percent], [7 * percent - 1]])
        assert _largest(counts, 700, (0.3,), float(f"{percent / 100:.2f}")).tolist() == [0.3, 0]
    assert chosen(changing(*[0.2] * 1, *[2] * 49)).lam == 1
    assert chosen(changing(*[0.2] * 2, *[2] * 48)).lam == 0.1


def test_a_tie_decides_nothing() -> None:
    lam = 0.5
    tied_before = torch.tensor([[[[1.0, 1.0]], [[3.0, -1.0]]]])  # class 1 wins as soon as lam > 0
    tied_after = changing(lam)
    for pictures in (tied_before, tied_before.flip(1), tied_after, tied_after.flip(1)):
        assert chosen(pictures, lams=[lam]).lam == lam
    assert chosen(changing(0.499), lams=[lam]).lam == 0


def test_agreement_may_rise_again_where_logits_are_rounded() -> None:
    pictures = torch.tensor([[[[1.0, 1.0]], [[1.0078125, 0.984375]]]])  # bf16 holds 1 - 1/256 and 1 + 1/128
    model, lams = Pooled().eval().bfloat16(), (0.5, 0.98, 0.99)
    tops = []
    for lam in lams:
        logits = timm_csra.wrap(Pooled().eval().bfloat16(), lam)(pictures.bfloat16())[0]
        assert logits.dtype == torch.bfloat16
        tops.append((logits == logits.max()).tolist())
    assert tops == [[True, True], [False, True], [True, True]]
    with pytest.warns(UserWarning, match="too few"):
        choice = choose_lam(model, [pictures], lams=lams, scores="logits")  # in float32, as loaders give them
    assert choice.agreement == {0.5: 1, 0.98: 0, 0.99: 1}
    assert choice.lam == 0.5
    assert chosen(pictures, lams=lams).agreement == {0.5: 1, 0.98: 0, 0.99: 0}


@pytest.mark.parametrize("scores", ["logits", "log_softmax"])
@pytest.mark.filterwarnings("ignore:.*(pictures, too few|the largest tried)")
def test_reduced_precision_is_that_of_the_wrapped_model(scores: str) -> None:
    x, lams = images(FAMILIES[0], 32), (0.3, 3, 30)

    def tops(model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        assert logits.dtype == torch.bfloat16
        return logits == logits.amax(1, keepdim=True)

    with torch.autocast("cpu", torch.bfloat16):
        choice = choose_lam(create("test_resnet"), [x], 0.5, lams, scores=scores)
    plain = tops(create("test_resnet"))
    wrapped = {lam: tops(timm_csra.wrap(create("test_resnet"), lam, scores=scores)) for lam in lams}
    assert choice.agreement == {lam: (plain & top).any(1).float().mean().item() for lam, top in wrapped.items()}


def test_the_spread_is_that_of_resampled_pictures() -> None:
    rng = np.random.default_rng(7)
    leaves = rng.choice(4, size=300, p=[0.02, 0.05, 0.1, 0.83])  # at which of three lams a picture changes
    agrees = np.arange(3) < leaves[:, None]
    lams, required = (0.1, 0.3, 1.0), 0.85
    picked = [agrees[rng.integers(300, size=300)] for _ in range(4000)]
    literal = [max((lam for i, lam in enumerate(lams) if rows[:, i].mean() >= required), default=0) for rows in picked]
    low, high = np.quantile(literal, [0.025, 0.975], method="inverted_cdf")
    assert (low, high) == (0.3, 1.0)
    assert _spread(agrees, lams, required) == (low, high)
    assert _spread(agrees[rng.permutation(300)], lams, required) == (low, high)


@pytest.mark.parametrize("keep", range(90, 101))
def test_the_spread_of_one_lam_is_binomial(keep: int) -> None:
    passes = binom.sf(94, 100, keep / 100)  # at least 95 of 100
    if min(abs(passes - 0.025), abs(passes - 0.975)) > 0.01:
        expected = (0.3 if passes > 0.975 else 0, 0.3 if passes > 0.025 else 0)
        assert _spread(np.arange(100)[:, None] < keep, (0.3,), 0.95) == expected


def test_what_is_told() -> None:
    assert str(chosen(changing(0.05, *[0.2] * 2, *[0.5] * 7), 0.9)).splitlines() == [
        "Use lam=0.1: at this lam, and at all smaller ones tried, at least 90 % of pictures keep their top class.",
        "  over resamples of the pictures  lam from 0 to 0.3 (95 % of resamples, n = 10)",
        "  pictures that keep their top class, T inf, scores logits",
        "    lam 0.1    90.00 %",
        "    lam 0.3    70.00 %",
        "    lam 1       0.00 %",
    ]
    told = str(chosen(changing(0.05), temperature=(5, math.inf)))
    assert told.startswith(
        "Use lam=0, the plain model: at lam=0.1, the smallest tried, fewer than 98 % of pictures keep their top class.\n"
    )
    assert "T 5+inf, scores logits" in told


def test_apply_wraps_with_what_was_chosen() -> None:
    choice = chosen(changing(0.2, 0.5), temperature=(50, math.inf), scores="log_softmax")
    assert choice.lam == 1  # of two classes that are equally sure at their best location, neither overtakes
    model = create("test_resnet")
    assert choice.apply(model) is model
    assert model.csra == timm_csra.CSRAConfig(1, (50, math.inf), "log_softmax")
    assert chosen(changing(0.05)).apply(model).csra.lam == 0


def test_warnings() -> None:
    enough, model = changing(*[0.2] * 200), Pooled().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_lam(model, [enough], scores="logits").lam == 0.2
    few = r"Pooled: found 199 pictures, too few to choose lam reliably: over resamples of them it goes from 0.1 to 0.1. Use at least 200\."
    with pytest.warns(UserWarning, match=few) as told:
        choose_lam(model, [enough[1:]], lams=[0.1, 1], scores="logits")
    assert len(told) == 1
    assert told[0].filename == __file__
    larger = r"Pooled: at lam=0.1, the largest tried, 100 % of pictures keep their top class, so a larger lam may pass, too. Try larger ones, such as lams=\(0.1, 0.2, 0.4\)\."
    with pytest.warns(UserWarning, match=larger) as told:
        choose_lam(model, [enough], lams=[0.1], scores="logits")
    assert len(told) == 1


PICTURES = changing(0.2, 0.5)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lams": []}, ValueError, "lams: found none; expected at least one value, all above 0"),
    ({"lams": [0.1, 0]}, ValueError, r"lams: found 0, 0.1; expected at least one value, all above 0 \(the plain model agrees"),
    ({"lams": [1, 0.1, 1]}, ValueError, "lams: found 0.1, 1, 1; expected .* no two equal"),
    ({"lams": [-0.1]}, ValueError, "lam must be finite and at least 0, got -0.1"),
    ({"lams": [math.inf]}, ValueError, "lam must be finite and at least 0, got inf"),
    ({"lams": ["0.1"]}, TypeError, "lam must be a real number, got '0.1'"),
    ({"lams": 0.1}, TypeError, r"lams: found 0.1; expected several numbers, such as \(0.1, 0.3, 1\)"),
    ({"agreement": 0}, ValueError, "agreement must be a share above 0 and at most 1, such as 0.98, got 0"),
    ({"agreement": 98}, ValueError, "agreement must be a share above 0 and at most 1, such as 0.98, got 98"),
    ({"agreement": math.nan}, ValueError, "agreement must be a share above 0 and at most 1, such as 0.98, got nan"),
    ({"agreement": "0.98"}, TypeError, r"agreement must be a real number, got '0.98' \(str\)"),
    ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
    ({"scores": "softmax"}, ValueError, "scores .*'logits'.*'log_softmax'.*'softmax'"),
    ({"pictures": []}, ValueError, "Pooled: the loader gave no picture; expected a few hundred"),
    ({"pictures": [PICTURES[:0]]}, ValueError, "Pooled: the loader gave no picture"),
    ({"pictures": PICTURES.unbind()}, TypeError, r"Pooled: the loader gave a tensor \(2, 1, 2\); expected images \(N, C, H, W\), or \(images, anything\). Use a DataLoader"),
    ({"pictures": [{"image": PICTURES}]}, TypeError, "Pooled: the loader gave a dict; expected images"),
    ({"pictures": [("label", PICTURES)]}, TypeError, "Pooled: the loader gave a str first in a tuple; expected images"),
    ({"pictures": [PICTURES.byte()]}, TypeError, r"Pooled: found images \(2, 2, 1, 2\) of torch.uint8; expected floats \(N, C, H, W\), as the model's transform gives them"),
    ({"pictures": [()]}, TypeError, "Pooled: the loader gave a tuple; expected images"),
    ({"pictures": PICTURES * math.nan}, ValueError, r"Pooled: found NaN or \+inf among the logits at lam=0, expected finite ones, or -inf .* Check the images"),
    ({"pictures": PICTURES + math.inf}, ValueError, r"found NaN or \+inf among the logits at lam=0"),
    ({"lams": [3e38]}, ValueError, r"Pooled: found NaN or \+inf among the logits at lam=3e\+38, .* Try smaller lams, or float32"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "text"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refusals(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        chosen(**{"pictures": PICTURES} | wrong)


@pytest.mark.filterwarnings("ignore:.*(pictures, too few|the largest tried)")
def test_models_that_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Pooled: found a model in training mode, expected eval: call model.eval\(\) first"
    ):
        choose_lam(Pooled(), [PICTURES])
    model, x = create("test_resnet"), images(FAMILIES[0])
    model.layer4.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="test_resnet: found `layer4` in training mode"):
        choose_lam(model, [x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(timm_csra.UnsupportedModelError, match="Sequential is not a timm classifier"):
        choose_lam(nn.Sequential(model), [x])
    with pytest.raises(timm_csra.UnsupportedModelError, match="num_classes=0"):
        choose_lam(timm.create_model("test_resnet", num_classes=0).eval(), [x])


class Prepares(Pooled):
    """A subclass of somebody's that prepares its pictures in `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5 * x.amax((2, 3), keepdim=True))


class Doubles(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.filterwarnings("ignore:.*(pictures, too few|the largest tried)")
def test_it_is_the_models_own_forward_that_is_run() -> None:
    x = torch.randn(40, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    for model in (Prepares().eval(), timm_csra.wrap(Prepares().eval(), 5)):
        found = choose_lam(model, [x], lams=(0.3, 1, 3), scores="logits").agreement
        assert found == pytest.approx(literal(Prepares().eval(), [x], (0.3, 1, 3)))
        assert found != pytest.approx(literal(Pooled().eval(), [x], (0.3, 1, 3)))
    replaced = Pooled().eval()
    replaced.forward = lambda x: x.mean((2, 3))  # type: ignore[method-assign]
    for model in (Doubles().eval(), replaced):
        with pytest.raises(
            timm_csra.UnsupportedModelError,
            match=f"{type(model).__name__}: its forward does not return what one call of its forward_head returned",
        ):
            choose_lam(model, [x])


@pytest.mark.filterwarnings("ignore:.*(pictures, too few|the largest tried)")
def test_a_masked_class_is_legal() -> None:
    pictures = torch.cat([changing(0.2, 0.5), torch.full((2, 1, 1, 2), 9.0)], dim=1)  # class 2 would win
    for scores in ("logits", "log_softmax"):
        model = Pooled(3).eval()
        model.bias.data[2] = -math.inf
        masked = choose_lam(model, [pictures], 0.5, (0.1, 0.3, 1), scores=scores)
        assert masked.agreement == chosen(pictures[:, :2], 0.5, scores=scores).agreement
        for temperature in (math.inf, 2.0):
            masked = choose_lam(model, [pictures], 0.5, (0.1, 0.3, 1), temperature, scores)
            assert masked.agreement == literal(model, [pictures], (0.1, 0.3, 1), temperature, scores)


@pytest.mark.parametrize("name", ["test_resnet", "pit_ti_224"])
@pytest.mark.filterwarnings("ignore:.*(pictures, too few|the largest tried)")
def test_nothing_is_changed_and_every_picture_runs_once(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    seen: list[int] = []

    def loader() -> Iterator[tuple[Tensor, None]]:
        for seed in range(2):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
            yield images(family, 2, seed), None

    for model in (create(name), timm_csra.wrap(create(name), 0.7, 3)):
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        attributes, kind = dict(model.__dict__), type(model)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        random = torch.get_rng_state()
        choose_lam(model, loader())
        assert torch.equal(torch.get_rng_state(), random)
        assert type(model) is kind
        assert model.__dict__ == attributes
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert seen == [2, 2, 2, 2]


@pytest.mark.cuda
def test_on_a_gpu(cuda: torch.device) -> None:
    model = Pooled().eval().to(cuda)
    with pytest.warns(UserWarning, match="too few"):
        choice = choose_lam(model, [PICTURES], 0.5, (0.1, 0.3, 1), scores="logits")
    assert choice == chosen(PICTURES, 0.5)


def test_no_extra_is_needed() -> None:
    code = f"""
        import sys
        sys.modules |= dict.fromkeys({[name for name in EXTRAS if name != "benchmarks"]})
        import timm, torch, timm_csra
        print(timm_csra.choose_lam(timm.create_model('test_resnet').eval(), [torch.randn(3, 3, 64, 64)]).images)
    """
    assert python("\n".join(line.strip() for line in code.splitlines())).stdout.strip() == "3"


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.filterwarnings("ignore:.*(pictures, too few|the largest tried)")
def test_real_photographs_and_checkpoints(name: str, real_data: Path, real_weights: Path) -> None:
    def load() -> nn.Module:
        return timm.create_model(f"local-dir:{real_weights / name}", pretrained=True).eval()

    model = load()
    transform = create_transform(**resolve_data_config(model=model))
    paths = sorted((real_data / "imagenette500" / "images").iterdir())[:100]
    batches = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]).split(32)
    choice = choose_lam(model, batches)
    expected = literal(load(), list(batches), LAMS, math.inf, "log_softmax")
    assert choice.agreement == pytest.approx(expected)
    assert choice.images == 100
    assert 0 < min(expected.values()) < 0.98 <= expected[0.05]  # it is a question here
    assert choice.spread[0] <= choice.lam <= choice.spread[1]
    assert choose_lam(model, torch.cat(batches).flip(0).split(17)) == choice


@pytest.mark.filterwarnings("ignore:.*the largest tried")
def test_a_model_compiled_in_place_gets_the_same_lam() -> None:
    model = timm.create_model("test_resnet", num_classes=5).eval()
    pictures = [torch.randn(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))]
    with pytest.warns(UserWarning, match="few to choose lam reliably"):
        expected = timm_csra.choose_lam(model, pictures)
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match="few to choose lam reliably"):
        assert timm_csra.choose_lam(model, pictures) == expected
