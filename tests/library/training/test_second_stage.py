"""The second stage: what is loaded, what is trained, what stays."""

import copy

import pytest
import torch
import torchvision.models as tv
from torch import nn

from scae_dali.training import checkpoint
from scae_dali.training.networks import make_network
from scae_dali.training.second_stage import ScaledLinear, SecondStageConfig, prepare, set_train_mode

CLASSES = 10


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, hidden layer, classifier inside a Sequential."""

    def __init__(self, classes=CLASSES, width=6, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width, 5)
        self.norm1d = nn.BatchNorm1d(5)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, classes, bias=bias))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.norm1d(self.hidden(x)))


def images(batch=8):
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def first():
    """A first stage's network: not a newly made one, nor its BatchNorm's statistics."""
    torch.manual_seed(3)
    net = Net()
    net(images())
    return net.eval()


@pytest.fixture
def weights(first, tmp_path):
    path = tmp_path / "weights.pt"
    checkpoint.save(path, first.state_dict())
    return str(path)


def prepared(weights, classifier, *, seed=0, net=None, **settings):
    torch.manual_seed(4)
    net = Net() if net is None else net
    config = SecondStageConfig(weights=weights, classifier=classifier, **settings)
    return net, prepare(net, config, CLASSES, seed=seed), config


def trained(net):
    return {name for name, p in net.named_parameters() if p.requires_grad}


def step(net, groups, config, lr=0.5):
    """One step of SGD in the second stage's mode."""
    groups = [{"params": g["params"], "lr": lr * g["lr_factor"]} for g in groups]
    optimizer = torch.optim.SGD(groups)
    set_train_mode(net, config)
    net(images()).logsumexp(1).sum().backward()
    optimizer.step()


def test_scaled_linear_by_hand():
    linear = nn.Linear(2, 3)
    head = ScaledLinear(linear)
    assert [name for name, _ in head.named_parameters()] == [
        "scale",
        "linear.weight",
        "linear.bias",
    ]
    x = torch.randn(4, 2)
    assert torch.equal(head(x), linear(x))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        linear.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
        head.scale.copy_(torch.tensor([1.0, 2.0, -1.0]))
    expected = torch.tensor([[4.0, 14.0, -10.0]])
    torch.testing.assert_close(head(torch.tensor([[1.0, 1.0]])), expected)


def test_the_scale_has_the_classifiers_type():
    assert ScaledLinear(nn.Linear(2, 3, dtype=torch.float64)).scale.dtype == torch.float64
    assert ScaledLinear(nn.Linear(2, 3, device="meta")).scale.device.type == "meta"


def test_reset_trains_a_new_classifier_and_nothing_else(first, weights):
    net, groups, config = prepared(weights, "reset", classifier_lr=0.5)
    assert trained(net) == {"head.1.weight", "head.1.bias"}
    assert groups == [{"params": [net.head[1].weight, net.head[1].bias], "lr_factor": 0.5}]
    old = first.state_dict()
    same = {key for key, value in net.state_dict().items() if torch.equal(value, old[key])}
    assert same == old.keys() - {"head.1.weight", "head.1.bias"}
    before = copy.deepcopy(net.state_dict())
    step(net, groups, config)
    after = net.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"head.1.weight", "head.1.bias"}


def test_reset_draws_from_the_seed_alone(weights):
    nets = []
    for state in (5, 6):
        net = Net()
        torch.manual_seed(state)
        rng = torch.get_rng_state()
        prepare(net, SecondStageConfig(classifier="reset", weights=weights), CLASSES, seed=11)
        assert torch.equal(torch.get_rng_state(), rng)
        nets.append(net)
    other, _, _ = prepared(weights, "reset", seed=12)
    first, second = (net.head[1].weight for net in nets)
    assert torch.equal(first, second)
    assert not torch.equal(first, other.head[1].weight)


def test_reset_draws_from_a_linear_layers_own_distribution(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(100, 1000))
    checkpoint.save(tmp_path / "w.pt", net.state_dict())
    nn.init.constant_(net[0].weight, 9.0)
    prepare(
        net, SecondStageConfig(classifier="reset", weights=str(tmp_path / "w.pt")), 1000, seed=0
    )
    weight = net[0].weight.detach()
    assert weight.abs().max().item() == pytest.approx(0.1, rel=1e-3)
    assert weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.01)
    assert 0.09 < net[0].bias.abs().max() <= 0.1


def test_scale_trains_one_factor_a_class_from_1(first, weights):
    net, groups, config = prepared(weights, "scale")
    assert trained(net) == {"head.1.scale"}
    assert groups == [{"params": [net.head[1].scale], "lr_factor": 1.0}]
    torch.testing.assert_close(net.eval()(images()), first(images()))
    before = copy.deepcopy(net.state_dict())
    step(net, groups, config)
    changed = {
        key for key, value in net.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"head.1.scale"}


def test_tune_goes_on_with_the_classifier_at_its_own_rate(first, weights):
    net, groups, config = prepared(weights, "tune", classifier_lr=0.2)
    head = net.head[1]
    assert trained(net) == {"head.1.scale", "head.1.linear.weight", "head.1.linear.bias"}
    assert groups == [
        {"params": [head.scale], "lr_factor": 1.0},
        {"params": [head.linear.weight, head.linear.bias], "lr_factor": 0.2},
    ]
    torch.testing.assert_close(net.eval()(images()), first(images()))
    assert all(p.grad is None for p in net.parameters())
    step(net, groups, config)
    for parameter, lr in ((head.scale, 0.5), (head.linear.bias, 0.1)):
        old = torch.ones(CLASSES) if parameter is head.scale else first.head[1].bias
        torch.testing.assert_close(parameter, old - lr * parameter.grad)


def test_only_norms_go_on_averaging(first, weights):
    net, groups, config = prepared(weights, "tune", train_norms=True)
    step(net, groups, config)
    norms = {f"{n}.{part}" for n in ("norm", "norm1d") for part in ("running_mean", "running_var")}
    norms |= {"norm.num_batches_tracked", "norm1d.num_batches_tracked"}
    old = first.state_dict()
    changed = {k for k, v in net.state_dict().items() if k in old and not torch.equal(v, old[k])}
    assert changed == norms


def modes(net):
    return {name for name, module in net.named_modules() if module.training}


def test_train_mode_by_module(weights):
    for classifier, heads in (
        ("reset", {"head.1"}),
        ("scale", {"head.1", "head.1.linear"}),
        ("tune", {"head.1", "head.1.linear"}),
    ):
        net, _, config = prepared(weights, classifier)
        net.train()
        set_train_mode(net, config)
        assert modes(net) == heads
        net, _, config = prepared(weights, classifier, train_norms=True)
        set_train_mode(net, config)
        assert modes(net) == heads | {"norm", "norm1d"}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_train_mode_knows_every_batchnorm(norm):
    net = nn.Sequential(norm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)).requires_grad_(False)
    set_train_mode(net, SecondStageConfig(classifier="reset", weights="w.pt", train_norms=True))
    assert modes(net) == {"0"}


def test_weights_of_a_second_stage_give_the_same_logits(weights, tmp_path):
    done, _, _ = prepared(weights, "tune")
    with torch.no_grad():
        done.head[1].scale.copy_(torch.linspace(0.5, 2, CLASSES))
    checkpoint.save(tmp_path / "second.pt", done.state_dict())
    again, _, _ = prepared(str(tmp_path / "second.pt"), "scale")
    assert torch.equal(again.head[1].scale, torch.ones(CLASSES))
    torch.testing.assert_close(again.eval()(images()), done.eval()(images()))


def test_a_network_that_has_a_scaled_head_is_served(first, weights):
    net, _, _ = prepared(weights, "tune")
    net, groups, _ = prepared(weights, "reset", net=net)
    assert isinstance(net.head[1], nn.Linear)
    assert trained(net) == {"head.1.weight", "head.1.bias"}
    assert groups[0]["params"] == [*net.head[1].parameters()]
    net, _, _ = prepared(weights, "scale", net=net)
    torch.testing.assert_close(net.eval()(images()), first(images()))


def test_a_classifier_without_bias(tmp_path):
    torch.manual_seed(0)
    done = Net(bias=False)
    done.head[1] = ScaledLinear(done.head[1])
    checkpoint.save(tmp_path / "w.pt", done.state_dict())
    for classifier in ("reset", "tune"):
        net, _, _ = prepared(str(tmp_path / "w.pt"), classifier, net=Net(bias=False))
        assert not any("bias" in name for name in trained(net))


def test_our_and_torchvisions_networks_in_channels_last_and_autocast(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for build, name in ((make_network, "cifar_resnet20"), (tv.get_model, "mobilenet_v3_small")):
        done = build(name, num_classes=CLASSES).to(memory_format=torch.channels_last)
        checkpoint.save(tmp_path / "w.pt", done.state_dict())
        net = build(name, num_classes=CLASSES).to(memory_format=torch.channels_last)
        _, _, config = prepared(str(tmp_path / "w.pt"), "tune", net=net)
        set_train_mode(net, config)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        logits.float().sum().backward()
        with_gradient = {name for name, p in net.named_parameters() if p.grad is not None}
        assert with_gradient == trained(net)
        torch.testing.assert_close(net.eval()(x), done.eval()(x))


def test_missing_weights_are_refused(tmp_path):
    for path, shown in ((str(tmp_path / "no.pt"), "no.pt"), (str(tmp_path), "")):
        config = SecondStageConfig(classifier="reset", weights=path)
        with pytest.raises(ValueError, match=rf"must be the file of .*{shown}.*; train.py writes"):
            prepare(Net(), config, CLASSES, seed=0)


def test_weights_of_others_are_refused(first, weights, tmp_path):
    path = tmp_path / "other.pt"
    for state, message in (
        ({"net": first.state_dict(), "epoch": 3}, "no state_dict of tensors; name a run's weights"),
        (torch.ones(3), "no state_dict of tensors"),
        (Net(classes=7).state_dict(), "is of 7 classes and the data of 10; name weights trained"),
        (
            Net(width=8).state_dict(),
            r"another network \(7 differences: conv.weight is \[8, 3, 3, 3\] there and "
            r"\[6, 3, 3, 3\] in the network; .*\); set model to that of the first stage",
        ),
        (
            make_network("cifar_resnet20", CLASSES).state_dict(),
            r"it lacks conv.weight; it lacks conv.bias\)",
        ),
        (first.state_dict() | {"more": torch.ones(1)}, r"\(1 differences: it has more, which the "),
    ):
        checkpoint.save(path, state)
        net = Net()
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=message):
            prepare(net, SecondStageConfig(classifier="reset", weights=str(path)), CLASSES, seed=0)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    path.write_bytes(b"not torch's")
    with pytest.raises(ValueError, match=r"other.pt' cannot be read"):
        prepare(Net(), SecondStageConfig(classifier="reset", weights=str(path)), CLASSES, seed=0)
    with pytest.raises(ValueError, match="linear classifier of 11 outputs"):
        prepare(Net(), SecondStageConfig(classifier="reset", weights=weights), 11, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": "new"}, "second_stage.classifier must be one of reset, scale, tune; got"),
        ({"classifier_lr": 0.0}, "second_stage.classifier_lr must be positive, got 0.0"),
        (
            {"classifier": "scale", "classifier_lr": 0.2},
            "got classifier_lr=0.2: leave it at 1, or choose tune",
        ),
        ({"weights": None, "classifier": "tune"}, "second_stage.weights must name .* got None"),
        ({"classifier": None}, "second_stage.classifier must be .* where other settings .* None"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SecondStageConfig(**{"classifier": "reset", "weights": "weights.pt"} | settings)


def test_the_default_is_no_second_stage():
    assert SecondStageConfig().classifier is None


def test_extra_state_of_the_first_stage_is_taken_over(tmp_path):
    class Versioned(Net):
        version = 1

        def get_extra_state(self):
            return {"version": self.version}

        def set_extra_state(self, state):
            self.version = state["version"]

    old = Versioned()
    old.version = 8
    checkpoint.save(tmp_path / "w.pt", old.state_dict())
    net, _, _ = prepared(str(tmp_path / "w.pt"), "tune", net=Versioned())
    assert net.version == 8
    assert torch.equal(net.conv.weight, old.conv.weight)
