"""The mixed cross-entropy, its class weights and its smoothing."""

import json
import math

import numpy as np
import pytest
import torch
from pairs import in_two
from torch.nn.functional import cross_entropy, one_hot

from scae_dali.training.losses import (
    Loss,
    LossConfig,
    class_balanced_weights,
    label_aware_smoothing,
    logit_adjustment,
    mixed_cross_entropy,
)
from tools.gpu.checks import no_waiting

CIFAR_LT = [int(500 * 0.01 ** (k / 99)) for k in range(100)]  # at an imbalance of 100


# A network is trained for a step: in one process on 8 images, or in two on 4 each.
IMPORTS = """
import torch
from torch.nn.parallel import DistributedDataParallel
from scae_dali.training.losses import Loss, LossConfig
from scae_dali.training.ranks import Ranks
"""
CODE = """
ranks = Ranks("cpu")
torch.manual_seed(0)
net = torch.nn.Linear(3, 4)
images, mu = torch.randn(8, 3), torch.tensor([1, 1, 0.5, 1, 1, 0.25, 1, 1])
labels, partners = torch.tensor([0, 0, 0, 0, 3, 3, 2, 1]), torch.tensor([0, 1, 3, 0, 3, 0, 2, 1])
own = slice(0, 4) if ranks.first else slice(4, 8)
model = net
if ranks.world > 1:
    model = DistributedDataParallel(net)
else:
    own = slice(0, 8)
config = LossConfig(class_balanced=0.999, label_smoothing=0.1, logit_adjust=0.5)
criterion = Loss(config, [500, 100, 20, 2], "cpu", mean_over_ranks=ranks.mean).at(0)
loss = criterion(model(images[own]), labels[own], partners[own], mu[own])
loss.backward()
losses = ranks.gather(loss.item())
if ranks.first:
    print([sum(losses) / len(losses), *net.weight.grad.flatten().tolist()])
ranks.close()
"""


def batch(size=8, classes=5):
    """logits, labels, partners, mu."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(size, classes, generator=generator),
        torch.randint(classes, (size,), generator=generator),
        torch.randint(classes, (size,), generator=generator),
        torch.rand(size, generator=generator),
    )


def test_it_is_the_cross_entropy_against_the_mixed_label():
    logits, labels, partners, mu = batch()
    mixed = mu[:, None] * one_hot(labels, 5) + (1 - mu[:, None]) * one_hot(partners, 5)
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            mixed_cross_entropy(logits, labels, partners, mu, smoothing),
            cross_entropy(logits, mixed, label_smoothing=smoothing),
        )


def test_it_takes_the_columns_that_dali_gives():
    logits, labels, partners, mu = batch()
    columns = (labels[:, None], partners[:, None], mu[:, None])
    weight, smoothing = torch.rand(5), torch.rand(5)
    torch.testing.assert_close(
        mixed_cross_entropy(logits, *columns, smoothing, weight=weight),
        mixed_cross_entropy(logits, labels, partners, mu, smoothing, weight=weight),
    )


def test_mu_1_leaves_the_label_and_half_precision_is_summed_in_float32():
    logits = torch.randn(4, 3, dtype=torch.bfloat16)
    labels, partners = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 1, 1])
    loss = mixed_cross_entropy(logits, labels, partners, torch.ones(4))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), labels))
    with torch.autocast("cpu", torch.bfloat16):
        inside = mixed_cross_entropy(
            logits, labels, partners, torch.ones(4), torch.zeros(3), weight=torch.ones(3)
        )
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss)


def test_weights_are_torchs_where_nothing_is_mixed():
    logits, labels, partners, _ = batch()
    weight = torch.tensor([0.1, 2.0, 1.0, 0.0, 0.5])
    torch.testing.assert_close(
        mixed_cross_entropy(logits, labels, partners, torch.ones(8), weight=weight),
        cross_entropy(logits, labels, weight=weight),
    )
    torch.testing.assert_close(
        mixed_cross_entropy(logits, labels, partners, torch.zeros(8), weight=weight),
        cross_entropy(logits, partners, weight=weight),
    )


def test_weights_of_1_and_one_smoothing_for_all_change_nothing():
    inputs = batch()
    plain = mixed_cross_entropy(*inputs, 0.1)
    torch.testing.assert_close(mixed_cross_entropy(*inputs, 0.1, weight=torch.ones(5)), plain)
    torch.testing.assert_close(
        mixed_cross_entropy(*inputs, 0.1, weight=torch.full((5,), 7.0)), plain
    )
    torch.testing.assert_close(mixed_cross_entropy(*inputs, torch.full((5,), 0.1)), plain)


def test_weights_and_smoothing_by_hand():
    """Two images of two classes, p = (1/4, 3/4) and (1/2, 1/2)."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    labels, partners, mu = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([0.75, 0.5])
    smoothing, weight = torch.tensor([0.2, 0.4]), torch.tensor([3.0, 1.0])
    low, high, half = math.log(4), math.log(4 / 3), math.log(2)
    mean = (low + high) / 2
    first = 0.75 * 3 * (0.8 * low + 0.2 * mean) + 0.25 * 1 * (0.6 * high + 0.4 * mean)
    expected = (first + half) / (0.75 * 3 + 0.25 + 1)
    found = mixed_cross_entropy(logits, labels, partners, mu, smoothing, weight=weight)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_is_that_of_the_smoothed_mixed_label():
    """d/dlogits of a mean of cross-entropies is (softmax - target)/B."""
    logits, labels, partners, mu = batch()
    smoothing = torch.linspace(0, 0.4, 5)
    logits.requires_grad_()
    mixed_cross_entropy(logits, labels, partners, mu, smoothing).backward()

    def target(classes):
        eps = smoothing[classes][:, None]
        return (1 - eps) * one_hot(classes, 5) + eps / 5

    mixed = mu[:, None] * target(labels) + (1 - mu[:, None]) * target(partners)
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - mixed) / 8)


def test_the_logit_adjustment_by_hand():
    # π = 1/2, 1/3, 1/6.
    found = logit_adjustment([30, 20, 10])
    np.testing.assert_allclose(found, -np.log([2, 3, 6]), rtol=1e-12)
    np.testing.assert_allclose(logit_adjustment([30, 20, 10], 0.5), found / 2, rtol=1e-12)
    assert found.dtype == np.float64
    with pytest.raises(ValueError, match="tau must be finite, got nan; 1 is Balanced Softmax"):
        logit_adjustment([30, 20, 10], float("nan"))
    # A class without images has the value of the smallest one that has some.
    np.testing.assert_allclose(logit_adjustment([30, 0, 10]), -np.log([4 / 3, 4, 4]), rtol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_an_adjusted_loss_is_that_of_weighted_exponentials(tau):
    """p_y = n_y^τ exp(z_y) / Σ n_k^τ exp(z_k), against the mixed and smoothed label."""
    logits, labels, partners, mu = batch()
    counts = [500, 170, 50, 20, 5]
    criterion = Loss(LossConfig(logit_adjust=tau, label_smoothing=0.1), counts, "cpu").at(0)
    terms = torch.tensor(counts).double() ** tau * logits.double().exp()
    log_p = (terms / terms.sum(1, keepdim=True)).log()
    expected = 0.0
    for i in range(8):
        for y, share in ((labels[i], mu[i]), (partners[i], 1 - mu[i])):
            target = 0.9 * one_hot(y, 5) + 0.1 / 5
            expected -= share * (target * log_p[i]).sum() / 8
    assert criterion(logits, labels, partners, mu).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_an_adjustment_to_equal_classes_changes_nothing_and_half_precision_is_kept_apart():
    inputs = batch()
    torch.testing.assert_close(
        mixed_cross_entropy(*inputs, adjustment=torch.full((5,), -7.5)),
        mixed_cross_entropy(*inputs),
    )
    counts = [9, 5, 3, 2, 1]
    torch.testing.assert_close(
        mixed_cross_entropy(*inputs, adjustment=logit_adjustment(counts)),
        mixed_cross_entropy(*inputs, adjustment=torch.tensor(logit_adjustment(counts)).float()),
    )
    for other in (torch.zeros(1), torch.zeros(4), torch.zeros(8, 5)):
        with pytest.raises(ValueError, match=r"adjustment must be \[5\], one for each class"):
            mixed_cross_entropy(*inputs, adjustment=other)
    # log π is added in float32: bfloat16 would round -6.123 to -6.125.
    logits, labels = torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([1])
    loss = mixed_cross_entropy(
        logits, labels, labels, torch.ones(1), adjustment=torch.tensor([0.0, -6.123])
    )
    assert loss.item() == pytest.approx(6.123 + math.log1p(math.exp(-6.123)), rel=1e-6)


def test_two_processes_have_the_gradient_of_the_whole_batch():
    """Rank 0 has rare partners and rank 1 rare labels, so that their weights differ."""
    scope: dict = {}
    shown = []
    exec(IMPORTS, scope)
    exec(CODE, scope | {"print": shown.append})
    together = in_two(IMPORTS + CODE)
    np.testing.assert_allclose(json.loads(together), shown[0], rtol=1e-5)


def test_class_balanced_weights_by_hand():
    # (1 - β)/(1 - β^n) at β = 1/2: 1/2 / (1/2, 3/4, 7/8) = 1, 2/3, 4/7; sum 47/21.
    found = class_balanced_weights([1, 2, 3], 0.5)
    np.testing.assert_allclose(found, np.array([1, 2 / 3, 4 / 7]) * 3 * 21 / 47, rtol=1e-12)
    assert found.dtype == np.float64


def test_class_balanced_weights_of_cifar_100_lt():
    weights = class_balanced_weights(CIFAR_LT)
    assert weights.sum() == pytest.approx(100)
    raw = [(1 - 0.9999) / (1 - 0.9999**n) for n in CIFAR_LT]
    np.testing.assert_allclose(weights, np.array(raw) * 100 / sum(raw), rtol=1e-9)
    assert weights[-1] / weights[0] == pytest.approx(97.6, abs=0.1)  # of n_0/n_99 = 500/5


def test_class_balanced_weights_at_the_ends_of_beta_and_for_empty_classes():
    np.testing.assert_array_equal(class_balanced_weights([9, 1, 4], 0.0), [1, 1, 1])
    near = class_balanced_weights([100, 50, 25], 1 - 1e-15)
    np.testing.assert_allclose(near, np.array([1, 2, 4]) * 3 / 7, rtol=1e-9)
    np.testing.assert_allclose(
        class_balanced_weights([0, 2, 3, 0], 0.5), [0, *class_balanced_weights([2, 3], 0.5), 0]
    )


def test_label_aware_smoothing_by_hand():
    # (n - 5)/(500 - 5) = 1, 1/3, 0 -> sin of 90°, 30°, 0°.
    found = label_aware_smoothing([500, 170, 5], 0.4, 0.1)
    np.testing.assert_allclose(found, [0.4, 0.25, 0.1], rtol=1e-12)
    assert found.dtype == np.float64


def test_label_aware_smoothing_falls_from_head_to_tail_on_cifar_100_lt():
    eps = label_aware_smoothing(CIFAR_LT, 0.4, 0.1)
    assert (eps[0], eps[-1]) == pytest.approx((0.4, 0.1))
    assert (np.diff(eps) <= 0).all()
    line = 0.1 + 0.3 * (np.array(CIFAR_LT) - 5) / 495
    assert (eps[1:90] > line[1:90]).all()  # concave


def test_label_aware_smoothing_of_equal_and_of_empty_classes():
    np.testing.assert_array_equal(label_aware_smoothing([7, 7], 0.4, 0.1), [0.4, 0.4])
    np.testing.assert_array_equal(label_aware_smoothing([7, 0, 7], 0.4, 0.1), [0.4, 0.1, 0.4])
    np.testing.assert_allclose(
        label_aware_smoothing([500, 0, 170, 5], 0.4, 0.1), [0.4, 0.1, 0.25, 0.1]
    )


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1], [[1, 2]]])
def test_bad_counts_are_named(counts):
    with pytest.raises(ValueError, match=r"class_counts must be \[K\]"):
        class_balanced_weights(counts)
    with pytest.raises(ValueError, match=r"class_counts must be \[K\]"):
        label_aware_smoothing(counts, 0.4, 0.1)
    with pytest.raises(ValueError, match=r"class_counts must be \[K\]"):
        logit_adjustment(counts)


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_bad_beta_is_named(beta):
    with pytest.raises(
        ValueError, match=r"beta must be in \[0, 1\), got .*; the paper's is 0.9999"
    ):
        class_balanced_weights([1, 2], beta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"logit_adjust": -1.0},
            r"loss.logit_adjust must be at least 0 and finite, got -1.0; 1 is",
        ),
        ({"logit_adjust": float("inf")}, r"loss.logit_adjust must be .* finite, got inf"),
        ({"logit_adjust": float("nan")}, r"loss.logit_adjust must be .* finite, got nan"),
        ({"label_smoothing": 1.0}, r"loss.label_smoothing must be in \[0, 1\), got 1.0"),
        ({"class_balanced": -0.1}, r"loss.class_balanced must be in \[0, 1\), got -0.1"),
        (
            {"smoothing_head": 1.5, "smoothing_tail": 0.1},
            r"loss.smoothing_head must be in \[0, 1\), got 1.5",
        ),
        ({"smoothing_head": 0.4}, r"go together, got 0.4 and None: give both or neither"),
        ({"smoothing_tail": 0.0}, r"go together, got None and 0.0: give both or neither"),
        (
            {"label_smoothing": 0.1, "smoothing_head": 0.4, "smoothing_tail": 0.1},
            r"loss.label_smoothing must be 0 beside .*, got 0.1",
        ),
        ({"defer": 3}, r"loss.defer=3 defers .* got loss.class_balanced=0: set it \(0.9999"),
        ({"defer": -1, "class_balanced": 0.9}, r"loss.defer must be an epoch >= 0, got -1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)


def test_the_default_loss_is_the_plain_one_in_every_epoch():
    inputs = batch()
    loss = Loss(LossConfig(), [5, 4, 3, 2, 1], "cpu")
    for epoch in (0, 100):
        assert torch.equal(loss.at(epoch)(*inputs), mixed_cross_entropy(*inputs))
    smoothed = Loss(LossConfig(label_smoothing=0.1), [5, 4, 3, 2, 1], "cpu")
    assert torch.equal(smoothed.at(0)(*inputs), mixed_cross_entropy(*inputs, 0.1))


def test_the_weights_act_from_the_deferred_epoch_on():
    inputs, counts = batch(), [50, 40, 30, 20, 1]
    loss = Loss(LossConfig(class_balanced=0.99, defer=160), counts, torch.device("cpu"))
    weight = torch.from_numpy(class_balanced_weights(counts, 0.99)).float()
    plain, weighted = mixed_cross_entropy(*inputs), mixed_cross_entropy(*inputs, weight=weight)
    assert plain != weighted
    assert [loss.at(t)(*inputs) for t in (0, 159, 160, 199)] == [plain, plain, weighted, weighted]
    at_once = Loss(LossConfig(class_balanced=0.99), counts, "cpu")
    assert at_once.at(0)(*inputs) == weighted


def test_smoothing_and_weights_together():
    inputs, counts = batch(), [500, 170, 50, 20, 5]
    config = LossConfig(smoothing_head=0.4, smoothing_tail=0.1, class_balanced=0.99)
    loss = Loss(config, counts, "cpu")
    eps = torch.from_numpy(label_aware_smoothing(counts, 0.4, 0.1)).float()
    weight = torch.from_numpy(class_balanced_weights(counts, 0.99)).float()
    expected = mixed_cross_entropy(*inputs, eps, weight=weight)
    assert torch.equal(loss.at(0)(*inputs), expected)


@pytest.mark.gpu
def test_the_loss_of_a_step_does_not_wait_for_the_device():
    config = LossConfig(
        logit_adjust=1.0, smoothing_head=0.4, smoothing_tail=0.1, class_balanced=0.99
    )
    criterion = Loss(config, [50, 40, 30, 20, 1], "cuda").at(0)
    inputs = [t.cuda() for t in batch()]
    with no_waiting():
        found = criterion(*inputs)
    torch.testing.assert_close(
        found.cpu(), Loss(config, [50, 40, 30, 20, 1], "cpu").at(0)(*batch())
    )
