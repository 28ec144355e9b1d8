"""The log of a run: rows, what a resume drops, lines for the reader."""

import json

import pytest
import torch

from scae_dali.methods import Status
from scae_dali.metrics import Log, Meter, closing, read_rows, summary
from scae_dali.ranks import Ranks


def row(epoch, **more):
    seconds = {"train": 10.0, "data": 2.0, "step": 8.0, "saliency": 1.0, "plan": 0.1, "val": 3.0}
    share = {"erased": 0.4, "no_map": 0.1, "flat_map": 0.0, "no_fit": 0.0, "mixed": 0.0}
    return {
        "epoch": epoch,
        "lam": 0.5,
        "train_loss": 1.0,
        "val_top1": 50.0 + epoch,
        "val_top5": 90.0,
        "img_per_s": 100.0,
        "seconds": seconds,
        "share": share,
        "overhead_percent": 11.0,
    } | more


def test_rows_are_appended_and_a_resume_drops_those_it_does_again(tmp_path):
    log = Log(tmp_path, 0)
    for epoch in range(3):
        log.write(row(epoch))
    assert log.close() == [row(0), row(1), row(2)]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')  # a kill in the midst of a line
    assert Log(tmp_path, 2).close() == [row(0), row(1)]
    log = Log(tmp_path, 2)
    log.write(row(2, val_top1=7.0))
    assert [line["val_top1"] for line in log.close()] == [50.0, 51.0, 7.0]


def test_there_are_no_rows_before_the_first(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_lines_for_the_reader():
    line = summary(row(4))
    for part in (
        "epoch   4",
        "top-1 54.00",
        "100 img/s",
        "λ 0.50",
        "erased 40.0%",
        "unguided 10.0%",
    ):
        assert part in line
    assert "unguided 10.0%" in line
    idle = {**row(4)["share"], "erased": 0.0}
    assert "λ" not in summary(row(4, lam=0.0, share=idle))
    end = closing([row(0, val_top1=60.0), row(1)])
    assert "top-1 51.00 (best 60.00, epoch 0), 100 img/s" in end
    assert "data 4.0 s, step 16.0 s, saliency 2.0 s, validation 6.0 s" in end
    assert "overhead of the method 11.0 %" in end


def test_the_meter_sums_an_epoch_and_forgets_it():
    meter, ranks = Meter(), Ranks("cpu")
    meter.add_batch(torch.tensor([0, int(Status.ERASED), int(Status.ERASED | Status.NO_MAP), 0]))
    for key, value in (("loss", 6.0), ("hits", 1), ("train", 2.0), ("data", 0.5), ("plan", 0.1)):
        meter.sums[key] += value
    meter.sums["saliency"] += 0.3
    line = meter.close_epoch(ranks, guided=True)
    assert (line["train_loss"], line["train_top1"], line["img_per_s"]) == (1.5, 25.0, 2.0)
    assert line["seconds"]["step"] == 1.5
    assert line["overhead_percent"] == pytest.approx(20.0)
    assert (line["share"]["erased"], line["share"]["no_map"]) == (0.5, 0.25)
    assert set(meter.sums.values()) == {0.0}
    assert meter.totals == {"train": 2.0, "saliency": 0.3, "plan": 0.1}
    meter.add_batch(torch.zeros(4, dtype=torch.int64))
    meter.sums["train"] += 2.0
    assert meter.close_epoch(ranks, guided=False)["overhead_percent"] == pytest.approx(7.5)
    json.dumps(line)
