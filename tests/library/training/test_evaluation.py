"""Figures of a validation: against torchmetrics, by hand, over two processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import in_two
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from scae_dali.training.evaluation import Evaluation
from scae_dali.training.losses import logit_adjustment
from scae_dali.training.ranks import Ranks
from tools.gpu.checks import no_waiting

ROOT = Path(__file__).parents[3]
COUNTS = np.array([500, 101, 100, 50, 20, 19, 0])
ALONE = Ranks("cpu")
# First rank 0 has all batches and rank 1 none, then they have one and two.
CODE = """
import json, torch
from scae_dali.training.evaluation import Evaluation
from scae_dali.training.ranks import Ranks
ranks = Ranks("cpu")
torch.manual_seed(0)
logits, labels = torch.randn(90, 7) * 3, torch.randint(6, (90,))
for shares in ((0, 1, 2), ()), ((0,), (1, 2)):
    evaluation = Evaluation([500, 101, 100, 50, 20, 19, 0], "cpu")
    for share in shares[ranks.rank]:
        part = slice(40 * share, 40 * share + 40)
        evaluation.update(logits[part], labels[part])
    figures = evaluation.compute(ranks)
    every = ranks.gather(figures)
    assert every[0] == every[1]
    if ranks.first:
        print(json.dumps(figures))
try:
    Evaluation([1], "cpu").compute(ranks)
except ValueError as error:
    assert "got none" in str(error)
else:
    raise AssertionError
ranks.close()
"""


def sample(images=90, classes=7, seed=0):
    torch.manual_seed(seed)
    return torch.randn(images, classes) * 3, torch.randint(classes - 1, (images,))


def figures(counts, *batches, adjustment=None):
    evaluation = Evaluation(counts, "cpu", adjustment)
    for logits, labels in batches:
        evaluation.update(logits, labels)
    return evaluation.compute(ALONE)


@pytest.mark.parametrize(("images", "classes"), [(90, 7), (300, 100)])
def test_figures_are_those_of_torchmetrics(images, classes):
    logits, labels = sample(images, classes)
    counts = np.arange(classes)
    got = figures(counts, (logits[:64], labels[:64]), (logits[64:], labels[64:]))

    def oracle(metric):
        metric.update(logits, labels)
        return (100 * metric.compute()).tolist()

    accuracy = {"num_classes": classes, "average": "micro"}
    assert got["val_top1"] == pytest.approx(oracle(MulticlassAccuracy(**accuracy)), abs=1e-4)
    top5 = oracle(MulticlassAccuracy(**accuracy, top_k=5))
    assert got["val_top5"] == pytest.approx(top5, abs=1e-4)
    ece = oracle(MulticlassCalibrationError(num_classes=classes, n_bins=15, norm="l1"))
    assert got["val_ece"] == pytest.approx(ece, abs=1e-4)
    each = oracle(MulticlassAccuracy(num_classes=classes, average="none"))
    seen = torch.bincount(labels, minlength=classes).tolist()
    assert got["val_per_class"][-1] is None
    for value, theirs, count in zip(got["val_per_class"], each, seen, strict=True):
        assert value == (pytest.approx(theirs, abs=1e-4) if count else None)


def test_groups_are_means_over_samples_with_bounds_of_the_training_counts():
    labels = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6])
    guesses = torch.tensor([0, 0, 1, 0, 2, 0, 4, 5, 0])
    logits = torch.nn.functional.one_hot(guesses, 7).float()
    got = figures(COUNTS, (logits, labels))
    assert got["val_top1"] == pytest.approx(100 * 5 / 9)
    assert got["val_many"] == pytest.approx(100 * 2 / 4)  # classes 0 and 1
    assert got["val_medium"] == pytest.approx(100 * 2 / 3)  # 2, 3 and 4
    assert got["val_few"] == pytest.approx(100 * 1 / 2)  # 5 and 6
    assert got["val_per_class"] == pytest.approx([200 / 3, 0, 100, 0, 100, 100, 0])
    json.dumps(got)


def test_what_has_no_sample_has_no_figure():
    logits = torch.eye(7)[:2]
    got = figures(COUNTS, (logits, torch.tensor([0, 1])))
    assert set(got) == {"val_top1", "val_top5", "val_many", "val_ece", "val_per_class"}
    assert got["val_per_class"] == [100, 100, None, None, None, None, None]
    with pytest.raises(ValueError, match=r"update\(\) must see a sample on some rank.*got none"):
        figures(COUNTS)


def test_calibration_error_by_hand():
    """Confidences 0.62 (right) and 0.65 (wrong) are in the tenth bin, 1.0 (wrong) in the last."""
    odds = torch.logit(torch.tensor([0.62, 0.65]))
    logits = torch.zeros(3, 2)
    logits[:2, 0] = odds
    logits[2, 0] = 200
    got = figures([1, 1], (logits, torch.tensor([0, 1, 1])))
    assert got["val_ece"] == pytest.approx(100 * (abs(1 - 0.62 - 0.65) + 1) / 3, abs=1e-4)
    sure = torch.tensor([[200.0, 0.0], [3.2, 0.0]])  # 1 and 0.961 share the last bin
    assert figures([1, 1], (sure, torch.tensor([1, 0])))["val_ece"] == pytest.approx(
        100 * abs(1 - 1 - sure[1].softmax(0)[0].item()) / 2, abs=1e-4
    )
    within = torch.tensor([[0.9, 0.1]])  # logits, though they look like probabilities
    assert figures([1, 1], (within, torch.tensor([0])))["val_ece"] == pytest.approx(
        100 * (1 - within.softmax(1)[0, 0].item()), abs=1e-4
    )


def test_of_equal_logits_the_first_class_comes_first_and_nan_is_never_right():
    labels = torch.arange(7)
    got = figures(COUNTS, (torch.zeros(7, 7), labels))
    assert got["val_per_class"] == [100, 0, 0, 0, 0, 0, 0]
    assert got["val_top5"] == pytest.approx(100 * 5 / 7)
    for dtype in (torch.bfloat16, torch.float16):
        logits, labels = sample(500)
        logits = logits.to(dtype)
        got = figures(COUNTS, (logits, labels))
        assert got["val_top1"] == pytest.approx(
            100 * (logits.argmax(1) == labels).double().mean().item()
        )
        assert got == figures(COUNTS, (logits.float(), labels))
    for classes in (3, 7):
        broken = figures(COUNTS[:classes], (torch.full((2, classes), torch.nan), torch.arange(2)))
        assert (broken["val_top1"], broken["val_top5"]) == (0, 0)
        assert np.isnan(broken["val_ece"])


def test_fewer_classes_than_five_and_a_read_only_count():
    counts = np.array([3, 2])
    counts.setflags(write=False)
    logits, labels = torch.randn(10, 2), torch.zeros(10, dtype=torch.int64)
    assert figures(counts, (logits, labels))["val_top5"] == 100


def test_the_second_set_is_that_of_logits_less_the_adjustment():
    logits, labels = sample()
    adjustment = logit_adjustment(COUNTS, 0.5)
    got = figures(COUNTS, (logits[:64], labels[:64]), (logits[64:], labels[64:]),
                  adjustment=adjustment)  # fmt: skip
    plain = figures(COUNTS, (logits, labels))
    adjusted = figures(COUNTS, (logits - torch.from_numpy(adjustment).float(), labels))
    assert got.keys() == plain.keys() | {f"{name}_adjusted" for name in plain}
    assert adjusted["val_few"] != plain["val_few"]
    for name, value in plain.items():
        assert got[name] == pytest.approx(value)
        assert got[f"{name}_adjusted"] == pytest.approx(adjusted[name])


def test_an_adjustment_by_hand():
    """Two classes of 90 and 10 images: log 9 = 2.197 is what separates them."""
    logits = torch.tensor([[2.0, 0.0], [2.4, 0.0], [0.0, 0.0]])
    got = figures(
        [90, 10], (logits, torch.tensor([1, 0, 1])), adjustment=logit_adjustment([90, 10])
    )
    assert got["val_top1"] == pytest.approx(100 / 3)  # the second alone
    assert got["val_top1_adjusted"] == pytest.approx(100)


def test_update_takes_no_gradient_and_runs_in_inference_mode():
    evaluation = Evaluation(COUNTS, "cpu")
    logits, labels = sample()
    evaluation.update(logits.requires_grad_(), labels)
    evaluation.compute(ALONE)
    with torch.inference_mode():
        evaluation.update(logits * 1, labels)
        twice = evaluation.compute(ALONE)
        once = figures(COUNTS, (logits * 1, labels))
    assert twice["val_per_class"] == once["val_per_class"]
    assert twice["val_ece"] == pytest.approx(once["val_ece"])


def test_update_never_reads_a_value_back():
    """Meta tensors have none: whatever would wait for a device fails on them."""
    evaluation = Evaluation(COUNTS, "meta", logit_adjustment(COUNTS))
    logits, labels = torch.zeros(4, 7, device="meta"), torch.zeros(4, device="meta").long()
    with pytest.raises(NotImplementedError, match="meta"):
        evaluation.compute(ALONE)
    evaluation.update(logits, labels)


@pytest.mark.gpu
def test_update_does_not_wait_for_the_gpu():
    logits, labels = sample()
    evaluation = Evaluation(COUNTS, "cuda", logit_adjustment(COUNTS))
    batch = logits.cuda(), labels.cuda()
    with no_waiting():
        evaluation.update(*batch)
    got = evaluation.compute(ALONE)
    alone = figures(COUNTS, (logits, labels), adjustment=logit_adjustment(COUNTS))
    for name in ("val_per_class", "val_per_class_adjusted"):
        assert got.pop(name) == alone.pop(name)
    assert got == pytest.approx(alone, abs=1e-4)


def test_bad_input_is_named():
    for counts in ([], [[1, 2]], [3, -1]):
        with pytest.raises(ValueError, match=r"class_counts must be \[K\] with no negative entry"):
            Evaluation(counts, "cpu")
    evaluation = Evaluation(COUNTS, "cpu")
    with pytest.raises(ValueError, match=r"logits must be \[B, 7\] and labels \[B\], got \[4, 6\]"):
        evaluation.update(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \[4, 7\] and \[4, 1\]; class_counts"):
        evaluation.update(torch.zeros(4, 7), torch.zeros(4, 1, dtype=torch.int64))


def test_two_processes_with_uneven_batches_have_the_figures_of_all_samples():
    expected = figures(COUNTS, sample())
    per_class = expected.pop("val_per_class")
    lines = in_two(CODE).splitlines()
    assert len(lines) == 2
    for got in map(json.loads, lines):
        assert got.pop("val_per_class") == per_class
        assert got == pytest.approx(expected)
