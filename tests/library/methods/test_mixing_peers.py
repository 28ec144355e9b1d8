"""MixUp and CutMix against torchvision and timm: the laws of weights and boxes, not the numbers.

The peers are asked through their pictures and labels alone: of two images, one black and one white,
the mixed one shows the box.
"""

import inspect

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup as TimmMixup
from torchvision.transforms import v2

from scae_dali.methods import Run, Samples, Status, compose, load, make_config, switch

N = 2000
SMALL, LARGE = (24, 32), (64, 96)  # not square: exchanged axes must show


def of_run(crop):
    """A run, and N samples, each a batch of two's first one."""
    n = 2 * N
    run = Run(seed=3, epochs=1, labels=np.zeros(n, int), class_counts=np.array([n]))
    these = Samples(
        ids=np.arange(n),
        keys=np.arange(n),
        labels=np.zeros(n, int),
        epoch=np.zeros(n, int),
        window=np.tile([0.0, 0.0, 1.0, 1.0], (n, 1)),
        size_px=np.tile(np.array(crop), (n, 1)),
        iteration=np.arange(n) // 2,
        place=np.arange(n) % 2,
        flip=np.zeros(n, bool),
    )
    return run, these.take(these.place == 0)


def mine(name, crop=SMALL, **settings):
    """(μ, boxes (y, x, h, w), whether mixed) of N samples."""
    module, (run, these) = load(name), of_run(crop)
    plan = module.Method(make_config(module, settings), run).plan(these)
    box = None
    if name == "cutmix":
        box = np.concatenate([plan["paste_anchors"][:, 2:], plan["paste_shapes"][:, 2:]], axis=1)
    return plan["mu"], box, plan["status"] == Status.MIXED_IN_BATCH


def switched(**settings):
    """μ of N batches, and whether CutMix mixes them."""
    run, these = of_run(LARGE)
    plan = compose.make(compose.configs("mixup|cutmix", settings), run).plan(these)
    return plan["mu"], plan["weight"] == 1


def pair(crop):
    """A black and a white image, float32 [2, 1, H, W], and their labels."""
    return torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).repeat(1, 1, *crop), torch.tensor([0, 1])


def box_of(image):
    """(y, x, h, w) of what is white in it: float32 [H, W]."""
    y, x = (np.flatnonzero(image.any(axis).numpy()) for axis in (1, 0))
    if not len(y):
        return [0, 0, 0, 0]
    box = [y[0], x[0], y[-1] + 1 - y[0], x[-1] + 1 - x[0]]
    assert image.sum() == box[2] * box[3]
    return box


@pytest.fixture(autouse=True)
def _seeds():
    """Both peers draw from global states."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield
    np.random.set_state(state)  # noqa: NPY002


def torchvisions(name, crop=SMALL, alpha=1.0):
    """The same of torchvision, whose draws are for a batch: N batches of two."""
    one = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](alpha=alpha, num_classes=2)
    images, labels = pair(crop)
    mu, boxes = [], []
    for _ in range(N):
        mixed, target = one(images, labels)
        mu.append(float(target[0, 0]))
        assert float(mixed[0].mean()) == pytest.approx(1 - mu[-1], abs=1e-5)
        if name == "cutmix":
            boxes.append(box_of(mixed[0, 0]))
    return np.array(mu), np.array(boxes), np.array(mu) < 1


def timms(name, crop=SMALL, alpha=1.0, prob=1.0):
    """The same of timm, whose draws are for a sample in this mode; the second half of a batch is
    the first one's other images."""
    kinds = {f"{kind}_alpha": alpha if kind == name else 0.0 for kind in ("mixup", "cutmix")}
    one = TimmMixup(**kinds, prob=prob, mode="elem", label_smoothing=0.0, num_classes=2)
    mu, boxes = [], []
    for _ in range(N // 50):
        images, labels = (half.repeat_interleave(50, dim=0) for half in pair(crop))
        mixed, target = one(images, labels)
        mu += target[:50, 0].tolist()
        if name == "cutmix":
            boxes += [box_of(image[0]) for image in mixed[:50]]
    return np.array(mu), np.array(boxes), np.array(mu) < 1


PEERS = {"torchvision": torchvisions, "timm": timms}
QUANTITIES = {
    "area": lambda b: b[:, 2] * b[:, 3],
    "height": lambda b: b[:, 2],
    "width": lambda b: b[:, 3],
    "top": lambda b: b[:, 0],
    "left": lambda b: b[:, 1],
    "bottom": lambda b: b[:, 0] + b[:, 2],
    "right": lambda b: b[:, 1] + b[:, 3],
    "centre": lambda b: (2 * b[:, 0] + b[:, 2]) * 1000 + 2 * b[:, 1] + b[:, 3],
}


def pvalues(one, other):
    """Of weights, and of each of QUANTITIES, of boxes that have an area."""
    # Rounded: what is the same share in float32 and in float64 must be a tie.
    out = {"mu": stats.ks_2samp(one[0].round(5), other[0].round(5)).pvalue}
    if one[1] is not None:
        a, b = (box[box[:, 2] * box[:, 3] > 0] for box in (one[1], other[1]))
        out |= {key: stats.ks_2samp(f(a), f(b)).pvalue for key, f in QUANTITIES.items()}
    return out


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixups_weights(peer, alpha):
    other = PEERS[peer]("mixup", (1, 1), alpha)
    assert min(pvalues(mine("mixup", alpha=alpha), other).values()) > 1e-4


# timm's sides may be odd, the authors', torchvision's and ours are even: small images show that.
@pytest.mark.parametrize(
    ("peer", "crop"), [("torchvision", SMALL), ("torchvision", LARGE), ("timm", LARGE)]
)
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_cutmixs_boxes_and_weights(peer, crop, alpha):
    one, other = mine("cutmix", crop, alpha=alpha), PEERS[peer]("cutmix", crop, alpha)
    assert min(pvalues(one, other).values()) > 1e-4
    for box, mu in ((one[1], one[0]), (other[1], other[0])):
        np.testing.assert_allclose(1 - mu, box[:, 2] * box[:, 3] / np.prod(crop), atol=1e-6)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("prob", [0.5, 1.0])
def test_as_many_are_mixed_as_by_timm(name, prob):
    """CutMix's boxes may be of no area, by either's rounding."""
    one, other = mine(name, LARGE, prob=prob), timms(name, LARGE, prob=prob)
    counts = [(mu < 1).sum() for mu in (one[0], other[0])]
    table = [[count, N - count + 1] for count in counts]
    assert stats.fisher_exact(table).pvalue > 1e-4
    assert one[2].sum() >= counts[0]
    assert stats.fisher_exact([table[0], [0.7 * prob * N, N - 0.7 * prob * N]]).pvalue < 1e-4


def test_switching_is_timms():
    """Once a batch: which of the two, and its weight; `switch_prob` is CutMix's share."""
    one = TimmMixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.3, label_smoothing=0.0, num_classes=2
    )
    images, labels = pair(LARGE)
    seen = []
    for _ in range(N):
        mixed, target = one(images.clone(), labels)
        seen.append((float(target[0, 0]), bool(((mixed == 0) | (mixed == 1)).all())))
    mu, by_cutmix = np.array(seen).T
    settings = {"switch_prob": 0.3, "mixup": {"alpha": 0.8, "per": "batch"}}
    mine_mu, mine_by_cutmix = switched(**settings, cutmix={"per": "batch"})
    table = [[part.sum(), N - part.sum()] for part in (by_cutmix, mine_by_cutmix)]
    assert stats.fisher_exact(table).pvalue > 1e-3
    for value in (0, 1):
        given = mu[by_cutmix == value], mine_mu[mine_by_cutmix == value]
        assert stats.ks_2samp(*(part.round(4) for part in given)).pvalue > 1e-3
    other = switched(switch_prob=0.7)[1]
    assert stats.fisher_exact([table[0], [other.sum(), N - other.sum()]]).pvalue < 1e-4
    defaults = inspect.signature(TimmMixup).parameters
    assert defaults["switch_prob"].default == switch.Config().switch_prob
    assert (defaults["prob"].default, defaults["mode"].default) == (1.0, "batch")


@pytest.mark.parametrize("peer", PEERS)
def test_the_comparison_can_fail(peer):
    other = PEERS[peer]("mixup", (1, 1))
    assert pvalues(mine("mixup", alpha=0.2), other)["mu"] < 1e-4
    assert pvalues(mine("mixup", alpha=2.0), other)["mu"] < 1e-4
    other = PEERS[peer]("cutmix", LARGE)
    wrong = pvalues(mine("cutmix", LARGE, alpha=0.2), other)
    assert max(wrong["mu"], wrong["area"], wrong["height"], wrong["width"]) < 1e-4
    wrong = pvalues(mine("cutmix", LARGE[::-1]), other)
    assert wrong["mu"] > 1e-4
    assert max(wrong["height"], wrong["bottom"], wrong["right"]) < 1e-4
    mu, box, mixed = mine("cutmix", LARGE)
    unclipped = np.random.default_rng(0).random(N)
    assert pvalues((unclipped, box, mixed), other)["mu"] < 1e-4  # μ is not λ
    assert mu.mean() > 0.65
