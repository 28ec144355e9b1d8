"""The log of a run: rows, what a resume drops, lines for the reader."""

import json

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator

from scae_dali.methods import Status
from scae_dali.training.log import Log, LogError, Meter, closing, read_rows, summary
from scae_dali.training.ranks import Ranks


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


def so_far(best, epoch, median):
    return {"best_top1": best, "best_epoch": epoch, "median10_top1": median}


def test_rows_are_appended_and_a_resume_drops_those_it_does_again(tmp_path):
    log = Log(tmp_path, 0)
    for epoch in range(3):
        log.write(row(epoch))
    lines = [row(0) | so_far(50, 0, 50), row(1) | so_far(51, 1, 50.5), row(2) | so_far(52, 2, 51)]
    assert log.close() == read_rows(tmp_path / "metrics.jsonl") == lines
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')  # a kill in the midst of a line
    assert Log(tmp_path, 2).close() == lines[:2]
    log = Log(tmp_path, 2)
    log.write(row(2, val_top1=7.0))
    again = row(2, val_top1=7.0) | so_far(51, 1, 50)
    assert log.close() == read_rows(tmp_path / "metrics.jsonl") == [*lines[:2], again]


def test_a_line_cut_off_spoils_none_after_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(0)) + '\n{"epoch": 1, "lo')
    log = Log(tmp_path, 1)
    log.write(row(1))
    log.close()
    assert [line["epoch"] for line in read_rows(path)] == [0, 1]
    path.write_text('{"epoch": 0, "lo\n' + json.dumps(row(1)) + "\n")
    with pytest.raises(LogError, match=r"metrics.jsonl', line 1 is no JSON; restore the file from"):
        read_rows(path)


def test_figures_of_the_run_go_on_from_an_older_log(tmp_path):
    top1 = [60.0, 80.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 90.0]
    rows = [row(epoch, val_top1=value) for epoch, value in enumerate(top1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    log = Log(tmp_path, 11)  # the best row is done again
    log.write(row(11, val_top1=80.0))
    *older, last = log.close()
    assert older == rows[:11]
    assert last == row(11, val_top1=80.0) | so_far(80, 1, 5.5)  # the median of epochs 2 to 11


def test_tensorboard_gets_figures_and_a_histogram_of_the_classes(tmp_path):
    log = Log(tmp_path, 0)
    log.write(row(0, val_few=9.0, val_per_class=[10.0, None, 30.0, 30.0]))
    assert log.close()[0]["val_per_class"] == [10.0, None, 30.0, 30.0]
    board = event_accumulator.EventAccumulator(str(tmp_path))
    board.Reload()
    names = {"best_top1", "best_epoch", "median10_top1", "val_few", "seconds/train"}
    assert names <= set(board.Tags()["scalars"])
    assert board.Tags()["histograms"] == ["val_per_class"]
    (event,) = board.Histograms("val_per_class")
    values = event.histogram_value
    assert (values.min, values.max, values.num, values.sum) == (10, 30, 3, 70)


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
    assert (
        "top-1 51.00 (epoch 1), best 60.00 (epoch 0), median of the last ten 55.50, top-5 90.00, "
        "100 img/s"
    ) in end
    assert "data 4.0 s, step 16.0 s, saliency 2.0 s, validation 6.0 s" in end
    assert "overhead of the method 11.0 %" in end


def test_lines_tell_of_many_and_few_where_the_row_does():
    tail = {"val_many": 65.12, "val_medium": 38.0, "val_few": 9.1, "val_ece": 3.2}
    assert "top-5 90.00 many 65.1 medium 38.0 few 9.1  100 img/s" in summary(row(4, **tail))
    assert "top-5 90.00  100 img/s" in summary(row(4))
    end = closing([row(0), row(1, **tail)])
    assert "top-5 90.00 many 65.1 medium 38.0 few 9.1 ece 3.2, 100 img/s" in end
    del tail["val_medium"]
    assert "many 65.1 few 9.1  " in summary(row(4, **tail))


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
