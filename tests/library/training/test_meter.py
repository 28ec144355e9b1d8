"""The meter of an epoch: its sums, and what a row has of them."""

import json

import pytest
import torch

from scae_dali.methods import Status
from scae_dali.training.meter import Meter
from scae_dali.training.ranks import Ranks


def test_the_meter_sums_an_epoch_and_forgets_it():
    meter, ranks = Meter(), Ranks("cpu")
    meter.add_batch(torch.tensor([0, int(Status.ERASED), int(Status.ERASED | Status.NO_MAP), 0]))
    meter.add_wait(0.5)
    meter.add_steps(loss=6.0, hits=1, seconds=2.0, plan_seconds=0.1)
    meter.add_pass(images=7, agreement=0.9, seconds=0.3)
    meter.add_validation(0.7)
    assert not meter.empty
    line = meter.close_epoch(ranks, guided=True)
    assert (line["train_loss"], line["train_top1"], line["img_per_s"]) == (1.5, 25.0, 2.0)
    assert line["seconds"]["step"] == 1.5
    assert line["seconds"]["val"] == 0.7
    assert line["overhead_percent"] == pytest.approx(20.0)
    assert (line["saliency_images"], line["saliency_agreement"]) == (7, 0.9)
    assert (line["share"]["erased"], line["share"]["no_map"]) == (0.5, 0.25)
    assert set(meter.sums.values()) == {0.0}
    assert meter.empty
    assert meter.totals == {"train": 2.0, "saliency": 0.3, "plan": 0.1}
    meter.add_batch(torch.zeros(4, dtype=torch.int64))
    meter.add_steps(loss=0.0, hits=0, seconds=2.0, plan_seconds=0.0)
    again = Meter()
    again.restore(dict(meter.sums), dict(meter.totals))
    line = meter.close_epoch(ranks, guided=False)
    assert line["overhead_percent"] == pytest.approx(7.5)
    assert "saliency_agreement" not in line
    assert again.close_epoch(ranks, guided=False) == line
    json.dumps(line)
