"""The mixed cross-entropy."""

import torch
from torch.nn.functional import cross_entropy, one_hot

from scae_dali.losses import mixed_cross_entropy


def test_it_is_the_cross_entropy_against_the_mixed_label():
    torch.manual_seed(0)
    logits, mu = torch.randn(8, 5), torch.rand(8)
    labels, partners = torch.randint(5, (8,)), torch.randint(5, (8,))
    mixed = mu[:, None] * one_hot(labels, 5) + (1 - mu[:, None]) * one_hot(partners, 5)
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            mixed_cross_entropy(logits, labels, partners, mu, smoothing),
            cross_entropy(logits, mixed, label_smoothing=smoothing),
        )


def test_it_takes_the_columns_that_dali_gives():
    torch.manual_seed(0)
    logits, mu = torch.randn(8, 5), torch.rand(8)
    labels, partners = torch.randint(5, (8,)), torch.randint(5, (8,))
    columns = (labels[:, None], partners[:, None], mu[:, None])
    torch.testing.assert_close(
        mixed_cross_entropy(logits, *columns), mixed_cross_entropy(logits, labels, partners, mu)
    )


def test_mu_1_leaves_the_label_and_half_precision_is_summed_in_float32():
    logits = torch.randn(4, 3, dtype=torch.bfloat16)
    labels, partners = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 1, 1])
    loss = mixed_cross_entropy(logits, labels, partners, torch.ones(4))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), labels))
