"""A run that diverged trained on to its end, with NaN in its checkpoint and its log.
https://github.com/Nerogar/OneTrainer/issues/1147, https://github.com/keras-team/keras/pull/6456
"""

import shutil

import pytest
import tiny_run
import torch
from tiny_run import Tiny, arguments, assert_same_run, rows, start

import train
from scae_dali.training.divergence import check_finite, sound
from scae_dali.training.evaluation import Evaluation
from scae_dali.training.ranks import Ranks
from scae_dali.training.second_stage import SecondStageConfig, prepare

images, tiny, whole = tiny_run.images, tiny_run.tiny, tiny_run.whole  # fixtures

NAN = float("nan")


def spoiling(step, change):
    """train_step that does `change` after the step of this number, from 0."""
    original, calls = train.Run.train_step, iter(range(step))

    def train_step(self, batch, score):
        original(self, batch, score)
        if next(calls, None) is None:
            change(self, score)

    return train_step


def of_loss(value):
    return lambda run, score: score.__setitem__(0, value)


@torch.no_grad()
def of_weights(run, score):
    run.net.fc.weight[0, 0] = float("inf")


def of_averages(run, score):
    run.net.features[1].running_var[1] = float("inf")


@pytest.mark.parametrize(
    ("step", "change", "said", "saved"),
    [
        (5, of_loss(NAN), r"loss is nan in steps 0 to 3 of epoch 1, with lr 0.05", (1, 0)),
        (7, of_loss(float("inf")), r"loss is inf in steps 3 to 4 of epoch 1", (1, 3)),
        (3, of_weights, r"weights are not finite in steps 3 to 4 of epoch 0", (0, 3)),
        (1, of_averages, r"weights are not finite in steps 0 to 3 of epoch 0", None),
    ],
)
def test_it_stops_before_anything_is_saved_and_the_last_good_state_goes_on(
    images,
    whole,
    tmp_path,
    monkeypatch,
    step,
    change,
    said,
    saved,
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_step", spoiling(step, change))
        with pytest.raises(SystemExit, match=rf"^error: the run has diverged: the {said}") as error:
            start(*arguments(images, out))
    assert "start anew in another --out with a lower --optim.lr" in str(error.value)
    assert not (out / "weights.pt").exists()
    if saved is None:
        assert not (out / "checkpoint.pt").exists()
    else:
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        assert (state["epoch"], state["step"]) == saved
        assert all(value.isfinite().all() for value in state["net"].values())
    assert [row["epoch"] for row in rows(out)] == [0] * bool(saved and saved[0])
    start(*arguments(images, out), "--resume")
    assert_same_run(out, whole)


def test_a_rate_that_is_far_too_high_is_met_at_the_first_epoch(images, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"diverged: .* of epoch 0, with lr 1e\+30"):
        start(*arguments(images, out, checkpoint_every=0, **{"optim.lr": 1e30, "optim.ema": 0.5}))
    assert sorted(path.name for path in out.iterdir() if "events" not in path.name) == [
        "config.json", "erased.png", "metrics.jsonl", "run.lock"
    ]  # fmt: skip
    assert not (out / "metrics.jsonl").read_text()


class Two(Ranks):
    """Two processes, of which the other one tells this."""

    def __init__(self, other):
        super().__init__("cpu")
        self.world, self._other = 2, other

    def gather(self, value):
        return [value, self._other]


def test_every_process_stops_where_one_diverges():
    check_finite(Two((3.0, True)), 1.0, True, "here")
    with pytest.raises(
        ValueError, match=r"the loss is nan in rank 1 here\. Nothing of these steps"
    ):
        check_finite(Two((NAN, True)), 1.0, True, "here")
    with pytest.raises(ValueError, match="the weights are not finite in rank 1 here"):
        check_finite(Two((3.0, False)), 1.0, True, "here")


def test_large_weights_masks_of_infinity_and_left_out_steps_are_sound():
    net = Tiny(3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    assert sound([net], optimizer).tolist() == [1.0]
    net.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    net.register_parameter("none", torch.nn.Parameter(torch.empty(0)))
    with torch.no_grad():
        net.fc.weight.fill_(1e38)
    before = net.fc.bias.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((net.fc.bias * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(net.fc.bias.detach(), before)
    assert sound([net, net], optimizer).tolist() == [1.0]
    net.fc.bias.grad = torch.zeros(3)
    optimizer.step()
    optimizer.state[net.fc.bias]["momentum_buffer"][0] = NAN
    assert sound([net], optimizer).tolist() == [0.0]
    optimizer.state.clear()
    assert sound([net], optimizer).tolist() == [1.0]
    with torch.no_grad():
        net.fc.bias[1] = NAN
    assert sound([net], optimizer).tolist() == [0.0]


def test_figures_that_are_no_number_are_null_in_the_log(
    images,
    tmp_path,
    monkeypatch,
    capsys,
):
    compute = Evaluation.compute
    monkeypatch.setattr(Evaluation, "compute", lambda *given: compute(*given) | {"val_ece": NAN})
    out = tmp_path / "run"
    start(*arguments(images, out, epochs=1))
    assert rows(out)[0]["val_ece"] is None
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    assert "ece" not in capsys.readouterr().out
    shutil.rmtree(out)


def test_a_first_stage_that_has_diverged_is_named(tmp_path):
    net = Tiny(3)
    net.features[1].running_var[0] = NAN
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    stage = SecondStageConfig(classifier="reset", weights=str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match=r"not finite \(features.1.running_var\): its first stage"):
        prepare(Tiny(3), stage, 3, seed=0)


def test_outputs_without_a_finite_number_are_said(capsys):
    for logits, said in ((torch.full((2, 3), NAN), True), (torch.eye(3)[:2], False)):
        evaluation = Evaluation([9, 9, 9], "cpu")
        evaluation.update(logits, torch.tensor([0, 1]))
        evaluation.compute(Ranks("cpu"))
        assert ("not finite for any of the 2 validation" in capsys.readouterr().err) == said
