"""train.py on two processes: they share the epoch, the pass and the log."""

import numpy as np
import pytest
import torch
from conftest import write_images, write_pngs
from pairs import in_two
from scripts import TWO_PROCESSES, arguments, long_tailed, rows, run_here, run_there

from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex


def test_two_processes_share_the_epoch_the_pass_and_the_log(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "two"
    write_images(data / "train", {"a": 30, "b": 15, "c": 5})
    write_images(data / "val", {"a": 5, "b": 5, "c": 5}, seed=1)
    settings = {"model": "cifar_resnet20", "batch_size": 4, "epochs": 3, "scae.refresh_every": 1}
    done = run_there(*TWO_PROCESSES, "train.py", *arguments(data, out, **settings))
    assert done.returncode == 0, done.stderr
    lines = rows(out)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert [line["saliency_images"] for line in lines] == [0, 50, 50]
    assert all(np.isfinite(line["train_loss"]) for line in lines)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert len(state["ranks"]) == 2
    with SaliencyCache(out / "saliency.lmdb", index=ImageIndex(data / "train")) as cache:
        assert (cache.stamps() == 2).all()
    with pytest.raises(SystemExit, match="was made by 2 processes, now there are 1"):
        run_here(monkeypatch, *arguments(data, out, **settings), "--resume")


# The weights of a batch are those of the images in both processes.
SHARED_LOSS = """
import os, torch, train
from pipelines import state
class Loss(state.Loss):
    def __init__(self, *arguments, mean_over_ranks, **keywords):
        super().__init__(*arguments, mean_over_ranks=mean_over_ranks, **keywords)
        print("mean of ranks", mean_over_ranks(torch.tensor(float(os.environ["RANK"]))).item())
state.Loss = Loss
"""


def test_two_processes_share_images_in_memory(tmp_path):
    data, out = tmp_path / "data", tmp_path / "two"
    write_pngs(data / "train", {"a": 40, "b": 20, "c": 3}, (32, 32))
    write_pngs(data / "test", {"a": 5, "b": 5, "c": 5}, (32, 32), seed=1)
    weighted = {"loss.class_balanced": 0.99}
    argv = ["train.py", *long_tailed(data, out, batch_size=4, epochs=2, **weighted)]
    said = in_two(f"{SHARED_LOSS}\nimport sys\nsys.argv = {argv}\ntrain.main()")
    assert said.count("mean of ranks 0.5\n") == 2
    lines = rows(out)
    assert [line["saliency_images"] for line in lines] == [0, 63]
    assert len(lines[-1]["val_per_class"]) == 3
