"""The average of a network's weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scae_dali.training.ema import EMA


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
