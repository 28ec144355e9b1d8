"""Steps of several batches: what the optimiser gets, by hand; the rest of an epoch; resumed."""

import copy

import pytest
import tiny_run
import torch
from tiny_run import arguments, assert_same_run, start, weights
from torch import nn
from torch.nn.functional import cross_entropy

import pipelines.state
import train

images, tiny = tiny_run.images, tiny_run.tiny  # fixtures


class Plain(nn.Module):
    """Without BatchNorm."""

    def __init__(self, classes):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, classes)

    def forward(self, images):
        return self.fc(self.features(images).relu().mean((2, 3)))


@pytest.fixture
def seen(monkeypatch):
    """Every batch of a run of `Plain`, with the network's first state and the rates."""
    monkeypatch.setattr(pipelines.state, "make_network", lambda name, classes, size: Plain(classes))
    kept = {"batches": [], "rates": []}
    step = train.Run.train_step

    def keep(run, batch, score):
        if not kept["batches"]:
            kept["net"] = copy.deepcopy(run.net)
        kept["batches"].append((batch.images.clone(), batch.labels.clone()))
        kept["rates"].append(run.optimizer.param_groups[0]["lr"])
        step(run, batch, score)

    monkeypatch.setattr(train.Run, "train_step", keep)
    return kept


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_steps_are_those_of_the_large_batch(images, tmp_path, seen, clip):
    """16 images in batches of 3 make 5 batches, and steps of 2, 2 and 1 of them."""
    cosine = {"optim.schedule": "cosine", "optim.clip": clip}
    start(*arguments(images, tmp_path / "run", batch_size=3, accumulate=2, **cosine))
    net, batches = seen["net"], seen["batches"]
    assert len(batches) == 10
    groups = [batches[i : i + 2] for i in (0, 2)] + [batches[4:5]]
    groups += [batches[i : i + 2] for i in (5, 7)] + [batches[9:]]
    rates = [0.05 * (1 + torch.tensor(k * torch.pi / 6).cos().item()) / 2 for k in range(6)]
    by_batch = [rate for rate, group in zip(rates, groups, strict=True) for _ in group]
    assert seen["rates"] == pytest.approx(by_batch)
    optimizer = torch.optim.SGD(
        net.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    for rate, group in zip(rates, groups, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(*group, strict=True))
        cross_entropy(net(x), y.long()).backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
            assert norm > clip, "the case shows nothing"
        optimizer.step()
    torch.testing.assert_close(weights(tmp_path / "run"), net.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"optim.name": "adamw", "optim.clip": 0.5}])
def test_a_run_goes_on_from_between_two_steps(images, tmp_path, monkeypatch, more):
    settings = {"batch_size": 2, "accumulate": 3, "checkpoint_every": 1} | more
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    start(*arguments(images, whole, **settings))
    calls, step = [], train.Run.train_step

    def stop(run, batch, score):
        calls.append(run.step)
        if len(calls) == 6:
            raise ValueError("stopped")
        step(run, batch, score)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_step", stop)
        with pytest.raises(SystemExit, match="stopped"):
            start(*arguments(images, out, **settings))
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (0, 3)  # a whole step, and not batch 5
    start(*arguments(images, out, **settings), "--resume")
    assert_same_run(out, whole)


def test_a_clipped_step_with_the_scaler_of_fp16(images, tmp_path, seen):
    """The first step moves the weights by lr times the norm, however large the loss's scale is."""
    plain = {"optim.momentum": 1e-9, "optim.weight_decay": 0, "epochs": 1, "batch_size": 16}
    start(*arguments(images, tmp_path / "run", amp="fp16", **{"optim.clip": 0.01}, **plain))
    assert len(seen["batches"]) == 1
    before, after = seen["net"].state_dict(), weights(tmp_path / "run")
    moved = torch.cat([(after[key] - before[key]).flatten() for key in before]).norm()
    assert moved.item() == pytest.approx(0.05 * 0.01, rel=0.01)


def test_accumulate_below_one_and_a_change_of_it_are_refused(images, tmp_path):
    with pytest.raises(SystemExit, match="accumulate must be at least 1 batch a step, got 0"):
        start(*arguments(images, tmp_path / "none", accumulate=0))
    out = tmp_path / "run"
    start(*arguments(images, out, epochs=1))
    for name, value, was in (("accumulate", 2, "1"), ("optim.name", "adamw", "'sgd'")):
        with pytest.raises(SystemExit, match=f"was made with {name}={was}, not "):
            start(*arguments(images, out, epochs=2, **{name: value}), "--resume")
