"""Learning rates, and the average of a network's weights."""

import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scae_dali.training.optim import EMA, OptimConfig


def changed(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for value in net.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 10)
    return net


def test_it_is_torchs_average():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    ours = EMA(net, 0.9)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for seed in range(4):
        ours.update_parameters(changed(net, seed))
        theirs.update_parameters(net)
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    assert ours.n_averaged == 4
    for name, value in ours.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)
    assert ours.module[1].num_batches_tracked == net[1].num_batches_tracked
    assert all(value.requires_grad for value in net.parameters())


def test_it_goes_on_from_its_state():
    net = nn.Linear(2, 2)
    first, second = EMA(net, 0.5), EMA(net, 0.5)
    first.update_parameters(changed(net, 0))
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.update_parameters(changed(net, 1))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_learning_rates_of_both_schedules():
    step = OptimConfig(lr=1.0, milestones=(2, 3), warmup_epochs=1.0)
    rates = [step.lr_at(k, 2, 4) for k in range(8)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    cosine = OptimConfig(lr=1.0, lr_min=0.2, schedule="cosine")
    rates = [cosine.lr_at(k, 2, 2) for k in range(5)]
    assert rates == pytest.approx([1.0, 0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447, 0.2])


def test_learning_rates_that_stay_the_same_within_an_epoch():
    """Those of the loops of LDAM-DRW and MiSLAS, by hand: 3 steps an epoch."""
    step = OptimConfig(lr=0.1, milestones=(5, 7), factor=0.01, warmup_epochs=4, lr_by_epoch=True)
    rates = [step.lr_at(k, 3, 8) for k in range(24)]
    by_epoch = [0.025, 0.05, 0.075, 0.1, 0.1, 1e-3, 1e-3, 1e-5]
    assert rates == pytest.approx([rate for rate in by_epoch for _ in range(3)])
    cosine = OptimConfig(lr=0.1, schedule="cosine", lr_by_epoch=True)
    rates = [cosine.lr_at(k, 3, 4) for k in range(12)]
    by_epoch = [0.1, 0.1 * 0.853553, 0.05, 0.1 * 0.146447]
    assert rates == pytest.approx([rate for rate in by_epoch for _ in range(3)], rel=1e-5)


@pytest.mark.parametrize("lr_by_epoch", [False, True])
def test_a_warm_up_of_no_whole_number_of_epochs_ends_at_lr(lr_by_epoch):
    config = OptimConfig(lr=1.0, warmup_epochs=1.5, milestones=(9,), lr_by_epoch=lr_by_epoch)
    rates = [config.lr_at(k, 3, 4) for k in range(9)]
    assert max(rates) == rates[4] == rates[-1] == 1.0
    assert rates[0] == pytest.approx(2 / 3 if lr_by_epoch else 1 / 4.5)


def test_nesterov_is_a_switch():
    """The third step of one weight with gradients 1, 2, 3 and momentum 0.5, by hand."""
    weights = []
    for nesterov in (True, False):
        weight = nn.Parameter(torch.zeros(()))
        settings = OptimConfig(lr=1.0, momentum=0.5, weight_decay=0.0, nesterov=nesterov)
        optimizer = settings.optimizer([{"params": [weight], "lr_factor": 1.0}])
        for gradient in (1.0, 2.0, 3.0):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
        weights.append(weight.item())
    # velocities 1, 2.5, 4.25; Nesterov's adds half of the velocity to the gradient
    assert weights == [-(1.5 + 3.25 + 5.125), -(1 + 2.5 + 4.25)]
    assert OptimConfig().nesterov


def test_adamw_is_torchs_and_spares_what_it_should():
    """Three steps against torch's own, with the groups that `decay_norms` makes."""
    nets = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    settings = OptimConfig(name="adamw", lr=0.01, weight_decay=0.3, decay_norms=False)
    ours = settings.optimizer([{"params": [*nets[0].parameters()], "lr_factor": 0.5}])
    settings.set_lr(ours, 0, 1, 1)
    decayed, spared = [nets[1][0].weight], [*nets[1].parameters()][1:]
    theirs = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": spared, "weight_decay": 0.0}],
        lr=0.005,
    )
    for seed in range(3):
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            (net(x) * torch.arange(4)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adamvv", "must be sgd or an optimiser of timm, got 'adamvv'; did you mean .*adam"),
        ("lookahead_adamvv", "got 'lookahead_adamvv'; did you mean .*adam"),
        ("lookahead_", "got 'lookahead_'; did you mean adamw"),
        ("lookahead_adahessian", "needs second derivatives"),
        ("adahessian", "needs second derivatives, which train.py does not compute"),
    ],
)
def test_names_of_no_optimiser(name, told):
    with pytest.raises(ValueError, match=told):
        OptimConfig(name=name).optimizer([{"params": [*nn.Linear(2, 2).parameters()]}])


def test_an_optimiser_of_a_package_that_is_not_installed_is_told(monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("APEX is absent")

    monkeypatch.setattr("timm.optim.create_optimizer_v2", refuse)
    groups = [{"params": [*nn.Linear(2, 2).parameters()]}]
    with pytest.raises(ValueError, match=r"'fusedlamb' cannot be made here \(APEX is absent"):
        OptimConfig(name="fusedlamb").optimizer(groups)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lookahead_goes_half_way_to_every_sixth_step_of_what_it_wraps(nesterov):
    """One weight with momentum 0.5 and gradient 1, by hand, across a saved state. timm begins the
    slow weight at the first sixth step, so the second one is the first that goes back."""
    name = "Lookahead_SGD"  # names in any case, as timm takes them
    settings = OptimConfig(name=name, lr=1.0, momentum=0.5, weight_decay=0.0, nesterov=nesterov)

    def made(value):
        weight = nn.Parameter(torch.tensor(value))
        return weight, settings.optimizer([{"params": [weight], "lr_factor": 1.0}])

    weight, optimizer = made(0.0)
    wanted, velocity, slow = 0.0, 0.0, None
    for step in range(1, 15):
        if step in (4, 8):
            state = optimizer.state_dict()
            weight, optimizer = made(weight.item())
            optimizer.load_state_dict(state)
        weight.grad = torch.tensor(1.0)
        optimizer.step()
        velocity = 0.5 * velocity + 1
        wanted -= 1 + 0.5 * velocity if nesterov else velocity
        if step % 6 == 0:
            slow = wanted if slow is None else slow + 0.5 * (wanted - slow)
            wanted = slow
        assert weight.item() == pytest.approx(wanted, rel=1e-6)


def test_without_timm_sgd_is_left(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    groups = [{"params": [*nn.Linear(2, 2).parameters()], "lr_factor": 1.0}]
    assert type(OptimConfig().optimizer(groups)) is torch.optim.SGD
    with pytest.raises(ValueError, match=r"name='adamw' needs the package timm.*pip install"):
        OptimConfig(name="adamw").optimizer(groups)


def test_gradients_are_scaled_to_the_norm_of_clip():
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    for clip, wanted in ((0.0, [3, 0, 4]), (1.0, [0.6, 0, 0.8]), (10.0, [3, 0, 4])):
        one.grad, other.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
        settings = OptimConfig(clip=clip)
        groups = [{"params": [value], "lr_factor": 1.0} for value in (one, other)]
        settings.clip_gradients(settings.optimizer(groups))
        assert torch.cat([one.grad, other.grad]).tolist() == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match=r"optim.clip must be at least 0, got -1"):
        OptimConfig(clip=-1.0)


def test_every_group_gets_its_share_of_the_rate():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    settings = OptimConfig(lr=1.0, milestones=(2,))
    factors = zip(net, (1.0, 0.2), strict=True)
    groups = [{"params": [*layer.parameters()], "lr_factor": one} for layer, one in factors]
    optimizer = settings.optimizer(groups)
    for step, rate in ((0, 1.0), (4, 0.1)):
        settings.set_lr(optimizer, step, 2, 4)
        rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
        assert rates == pytest.approx([rate, 0.2 * rate])


def test_a_state_of_an_optimiser_that_is_not_fused_goes_on():
    """As runs of earlier versions have it; fp16 scales the gradients."""
    ends = []
    for fused in (True, None):
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        optimizer = OptimConfig(lr=0.1).optimizer([{"params": [*net.parameters()]}])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for k in range(6):
            if k == 3:
                state = optimizer.state_dict()
                for group in state["param_groups"]:
                    group["fused"] = fused
                optimizer = OptimConfig(lr=0.1).optimizer([{"params": [*net.parameters()]}])
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            scaler.scale(net(torch.full((2, 5), k + 1.0)).square().mean()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert all(group["fused"] for group in optimizer.param_groups)
        ends.append(net.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", ["part", "transposed", "complex", "expanded"])
def test_parameters_that_the_fused_kernel_does_not_take(kind):
    """Part of a larger tensor: what lies beside it must stay."""

    def trained(make):
        torch.manual_seed(0)
        base = torch.randn(8, 8)
        view = {
            "part": base[:, :4],
            "transposed": base.T,
            "complex": base + 1j * base,
            "expanded": base[:, :1].expand(8, 3).clone(),
        }[kind]
        parameter = nn.Parameter(view)
        optimizer = make(parameter)
        for _ in range(3):
            optimizer.zero_grad()
            (parameter * parameter.conj()).real.sum().backward()
            optimizer.step()
        return parameter.detach(), base

    ours = trained(lambda p: OptimConfig(lr=0.1, weight_decay=0.0).optimizer([{"params": [p]}]))
    theirs = trained(lambda p: torch.optim.SGD([p], 0.1, 0.9, nesterov=True))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
def test_layers_that_are_left_out_of_steps(nesterov, resumed):
    """As stochastic depth and LayerDrop do: some have their first gradient late."""

    def trained(make):
        torch.manual_seed(0)
        first, *others = (nn.Linear(4, 4) for _ in range(4))
        params = [p for layer in (first, *others) for p in layer.parameters()]
        optimizer = make(params)
        for step, kept in enumerate([(), (1,), (0, 1), (), (0, 2), (2,)]):
            if resumed and step == 4:
                state, optimizer = optimizer.state_dict(), make(params)
                optimizer.load_state_dict(state)
            x = first(torch.ones(2, 4))
            for k in kept:
                x = others[k](x).relu()
            optimizer.zero_grad()
            x.square().sum().backward()
            optimizer.step()
        return params

    config = OptimConfig(lr=0.01, weight_decay=0.1, nesterov=nesterov)
    ours = trained(lambda params: config.optimizer([{"params": params}]))
    theirs = trained(
        lambda params: torch.optim.SGD(
            params, 0.01, 0.9, weight_decay=0.1, nesterov=nesterov, foreach=False
        )
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_momentum_of_another_memory_layout_is_that_of_its_parameter():
    ends = []
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        optimizer = OptimConfig(lr=0.1).optimizer([{"params": [*net.parameters()]}])
        for step in range(4):
            if step == 2:
                state = optimizer.state_dict()
                for one in state["state"].values():
                    if one["momentum_buffer"].ndim == 4:
                        one["momentum_buffer"] = one["momentum_buffer"].contiguous(
                            memory_format=layout
                        )
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            net(torch.ones(2, 3, 6, 6)).square().mean().backward()
            optimizer.step()
        ends.append(net.weight.detach().clone())
    assert torch.equal(*ends)


def test_sparse_gradients_are_refused_with_a_remedy():
    table = nn.Embedding(16, 8, sparse=True)
    optimizer = OptimConfig().optimizer([{"params": [*table.parameters()]}])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"parameter of shape \(16, 8\).*with sparse=False"):
        optimizer.step()
