"""Random Erasing against torchvision's and timm's own: what they erase, drawn from their code."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from plans import method, samples
from scipy import stats
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision.transforms import v2

import train
from pipelines.recipe import Config
from scae_dali.methods import Status, compose, load, make_config
from scae_dali.methods.random_erasing import PRESETS as ERASING_PRESETS
from scae_dali.methods.random_erasing import Config as RandomErasingConfig
from scae_dali.methods.scae import Config as ScaeConfig

N = 4000


def boxes_of(erased: torch.Tensor) -> np.ndarray:
    """(y, x, h, w) of what is not 0: bool [B, H, W] -> int64 [B, 4]."""
    boxes = []
    for axis in (1, 2):
        seen = erased.any(dim=3 - axis)
        length = seen.shape[1]
        first = seen.int().argmax(dim=1)
        last = length - 1 - seen.flip(1).int().argmax(dim=1)
        boxes.append(torch.stack([first, last - first + 1], dim=1))
    y, x = boxes
    box = torch.stack([y[:, 0], x[:, 0], y[:, 1], x[:, 1]], dim=1)
    assert (erased.sum(dim=(1, 2)) == box[:, 2] * box[:, 3]).all()
    return box.numpy()


def erase_as(peer, images, **settings):
    """The peer's erasing of every image, at a fixed seed. images: float [B, C, h, w]."""
    state = random.getstate()
    random.seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if peer == "torchvision":
            erase = v2.RandomErasing(p=1.0, **({"value": 1} | settings))
            out = torch.stack([erase(image) for image in images])
        else:
            out = TimmErasing(1.0, mode="pixel", device="cpu", **settings)(images)
    random.setstate(state)
    return out


def peer_boxes(name, h, w):
    """What the peer erases in N images of zeros."""
    return boxes_of(erase_as(name, torch.zeros(N, 1, h, w))[:, 0] != 0)


def mine(preset, h, w, n=N):
    plan = method("random_erasing", prob=1.0, preset=preset).plan(samples(n, size=(h, w)))
    assert (plan["status"] == Status.ERASED).all()
    return plan["box"].astype(int)


def quantities(box, h, w):
    """What the laws are compared by, float64 [n] each, with (y, x) as places among those free."""
    return {
        "area": box[:, 2] * box[:, 3],
        "aspect": box[:, 2] / box[:, 3],
        "height": box[:, 2],
        "y": box[:, 0] / np.maximum(1, h - box[:, 2]),
        "x": box[:, 1] / np.maximum(1, w - box[:, 3]),
        "middle": box[:, 0] + box[:, 2] / 2 + 1000 * (box[:, 1] > (w - box[:, 3]) / 2),
        "bottom right": (box[:, 0] + box[:, 2]) * w + box[:, 1] + box[:, 3],
    }


def p_values(one, other, h, w):
    pairs = zip(quantities(one, h, w).items(), quantities(other, h, w).values(), strict=True)
    return {name: stats.ks_2samp(a, b).pvalue for (name, a), b in pairs}


def law_of(peer):
    """(low, high) of the area, (low, high) of log(h/w): from the peer's own attributes."""
    if peer == "torchvision":
        erase = v2.RandomErasing()
        return erase.scale, tuple(erase._log_ratio.tolist())
    erase = TimmErasing()
    return (erase.min_area, erase.max_area), erase.log_aspect_ratio


@pytest.mark.parametrize("peer", ["torchvision", "timm"])
def test_a_preset_has_the_constants_of_its_implementation(peer):
    area, log_aspect = law_of(peer)
    config = RandomErasingConfig(preset=peer)
    for name, value in ERASING_PRESETS[peer].items():
        assert getattr(config, name) == value
    assert config.area == area
    assert config.aspect_law == "log"
    assert np.log(config.aspect) == pytest.approx(log_aspect, abs=1e-6)  # float32 in torchvision
    if peer == "torchvision":
        assert v2.RandomErasing().ratio == config.aspect
        assert (v2.RandomErasing().value, config.fill) == ([0], "mean")  # normalised already
    else:
        assert (TimmErasing().min_count, TimmErasing().max_count) == (1, 1)
        assert (TimmErasing(mode="pixel").per_pixel, config.fill) == (True, "noise")


@pytest.mark.parametrize("peer", ["torchvision", "timm"])
def test_a_preset_tries_as_often_as_its_implementation(peer, monkeypatch):
    """Counted by the square roots that it takes for a size that fits at once, and for one never."""
    taken = []

    def sqrt(x):
        taken.append(x)
        return root(x)

    root = math.sqrt
    monkeypatch.setattr(math, "sqrt", sqrt)
    counts = []
    for area, aspect in ((0.1, 1.0), (0.9, 100.0)):
        taken.clear()
        if peer == "torchvision":
            settings = {"scale": (area, area), "ratio": (aspect, aspect)}
        else:
            settings = dict.fromkeys(("min_area", "max_area"), area)
            settings |= dict.fromkeys(("min_aspect", "max_aspect"), aspect)
        erased = erase_as(peer, torch.zeros(1, 1, 32, 32), **settings) != 0
        assert erased.any() == (aspect == 1)
        counts.append(len(taken))
    assert counts[1] == ERASING_PRESETS[peer]["tries"] * counts[0] > 0


@pytest.mark.parametrize("size", [(32, 32), (64, 40)])
@pytest.mark.parametrize("peer", ["torchvision", "timm"])
def test_a_preset_erases_as_its_implementation_does(peer, size):
    values = p_values(mine(peer, *size), peer_boxes(peer, *size), *size)
    assert min(values.values()) > 1e-4, values


def test_the_authors_law_is_told_apart():
    values = p_values(mine("official", 64, 40), peer_boxes("timm", 64, 40), 64, 40)
    assert values["aspect"] < 1e-10
    assert values["area"] < 1e-10
    assert values["y"] > 1e-4


def test_three_of_four_of_the_authors_rectangles_are_tall_and_half_of_the_others():
    """(3.33 - 1) / (3.33 - 0.3) = 0.77, less what does not fit and what is square."""

    def tall(preset):
        box = mine(preset, 224, 224, 20_000)
        return (box[:, 2] > box[:, 3]).mean()

    def is_the_authors(share):
        return abs(share - 0.75) < 0.02

    assert is_the_authors(tall("official"))
    assert not is_the_authors(tall("torchvision"))
    for preset in ERASING_PRESETS:
        assert tall(preset) == pytest.approx(0.5, abs=0.015)


def mean_area(area, aspect, law, h, w):
    """Of a rectangle that fits, as a share of the image: a mean over 1000 x 1000 equal parts of
    the law. law: the aspect's function that is uniform; aspect: its range, in terms of that."""
    u = (np.arange(1000) + 0.5) / 1000
    a = (area[0] + (area[1] - area[0]) * u)[:, None] * h * w
    r = law(aspect[0] + (aspect[1] - aspect[0]) * u)
    height, width = np.round(np.sqrt(a * r)), np.round(np.sqrt(a / r))
    return (height * width)[(height < h) & (width < w)].mean() / (h * w)


MEAN_AREAS = {
    "official": mean_area((0.02, 0.4), (0.3, 3.33), np.asarray, 32, 32),
    "torchvision": mean_area(*law_of("torchvision"), np.exp, 32, 32),
    "timm": mean_area(*law_of("timm"), np.exp, 32, 32),
}


def has_mean_area(box, preset):
    """Within 3.5 standard errors, which are 0.00014 for torchvision's and timm's 400,000 boxes."""
    area = box[:, 2:].prod(axis=1) / 32**2
    return abs(area.mean() - MEAN_AREAS[preset]) < 3.5 * area.std() / math.sqrt(len(box))


@pytest.mark.parametrize(
    ("preset", "area"), [("official", 0.201), ("torchvision", 0.174), ("timm", 0.176)]
)
def test_mean_areas_at_32_pixels(preset, area):
    """The published ones; and each is that of its own law and of no other."""
    assert MEAN_AREAS[preset] == pytest.approx(area, abs=0.0006)
    box = mine(preset, 32, 32, 400_000)
    assert [name for name in MEAN_AREAS if has_mean_area(box, name)] == [preset]


@pytest.mark.parametrize("peer", ["torchvision", "timm"])
def test_the_peers_own_mean_area_is_that_of_its_law(peer):
    assert has_mean_area(peer_boxes(peer, 32, 32), peer)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("official", ((0.02, 0.4), (0.3, 3.33), "uniform", 100, "mean")),
        ("torchvision", ((0.02, 0.33), (0.3, 3.3), "log", 10, "mean")),
        ("timm", ((0.02, 1 / 3), (0.3, 1 / 0.3), "log", 10, "noise")),
    ],
)
def test_a_preset_survives_on_its_way_to_the_method(preset, wanted):
    """Through asdict, through a change of the probability, and from the command line."""

    def settings_of(config):
        return config.area, config.aspect, config.aspect_law, config.tries, config.fill

    config = RandomErasingConfig(preset=preset)
    assert settings_of(config) == wanted
    again = make_config(load("random_erasing"), dataclasses.asdict(config))
    assert again == config
    assert settings_of(dataclasses.replace(config, prob=0.25)) == wanted
    parser = train.make_parser()
    line = ["--data.root=none", "--out=none", "--method=random_erasing"]
    given = parser.parse_args([*line, f"--random_erasing.preset={preset}"])
    settings = parser.instantiate(given)
    full = Config(**{name: settings[name] for name in Config.__dataclass_fields__})
    assert full.random_erasing == config
    assert full.method_configs() == {"random_erasing": config}
    given = compose.configs("random_erasing", full.method_configs())
    assert given == {"random_erasing": config}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"preset": "timm", "area": (0.1, 0.2)},
            r"preset=timm sets area, aspect, aspect_law, tries, fill, got area=\(0.1, 0.2\), asp"
            ".*set all of them without one",
        ),
        (
            dataclasses.asdict(RandomErasingConfig(preset="timm")) | {"fill": "mean"},
            "preset=timm sets .*, got fill=mean too",
        ),
        ({"preset": "kornia"}, "preset must be one of official, torchvision, timm; got 'kornia'"),
        ({"aspect_law": "normal"}, "aspect_law must be one of uniform, log; got 'normal'"),
    ],
)
def test_settings_are_validated(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomErasingConfig(**settings)


def test_scae_draws_the_aspect_uniformly_and_may_draw_its_logarithm():
    assert ScaeConfig().aspect_law == "uniform"
    both = [
        method("scae", p_min=1.0, p_max=1.0, aspect_law=law).plan(samples(4000))["box"]
        for law in ("uniform", "log")
    ]
    tall = [(box[:, 2] > box[:, 3]).mean() for box in both]
    assert tall[1] == pytest.approx(0.5, abs=0.03)
    assert tall[0] > 0.7
