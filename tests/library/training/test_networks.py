"""The networks for 32 px: sizes and arithmetic; networks of timm and of the user's own; where a
network keeps its classifier."""

import sys
from functools import partial

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn
from torch.nn.functional import batch_norm, conv2d

from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.layers import classifier_of
from scae_dali.training.networks import MODELS, CifarResNet, check_fits, make_network
from scae_dali.training.second_stage import ScaledLinear, SecondStageConfig, set_train_mode


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar_resnet20", 269_722),
        ("cifar_resnet32", 464_154),
        ("cifar_resnet44", 658_586),
        ("cifar_resnet56", 853_018),
        ("cifar_resnet18", 11_173_962),
    ],
)
def test_parameters_of_10_classes(name, expected):
    assert parameters(make_network(name, 10)) == expected


def test_parameters_grow_with_the_classes_only_by_the_classifier():
    assert parameters(make_network("cifar_resnet32", 100)) == 464_154 + 90 * 65
    assert set(MODELS) == {f"cifar_resnet{depth}" for depth in (18, 20, 32, 44, 56)}


def test_the_number_of_layers_and_the_maps_of_each_stage():
    net = make_network("cifar_resnet32", 7).eval()
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()) == 32
    x = net.conv1(images())
    for stage, shape in (("layer1", (16, 32)), ("layer2", (32, 16)), ("layer3", (64, 8))):
        x = net.get_submodule(stage)(x)
        assert x.shape == (2, shape[0], shape[1], shape[1])
    assert net(images()).shape == (2, 7)


def test_a_wider_block_by_hand():
    """Subsampled identity in the middle channels, zeros around it, two convolutions on top."""
    block = make_network("cifar_resnet20", 10).layer2[0].eval()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    identity = torch.zeros(2, 32, 4, 4)
    identity[:, 8:24] = x[:, :, [0, 2, 4, 6]][:, :, :, [0, 2, 4, 6]]
    y = conv2d(x, block.conv1.weight, stride=2, padding=1)
    y = batch_norm(y, block.bn1.running_mean, block.bn1.running_var).relu()
    y = conv2d(y, block.conv2.weight, padding=1)
    y = batch_norm(y, block.bn2.running_mean, block.bn2.running_var)
    torch.testing.assert_close(block(x), (identity + y).relu())


def test_weights_start_from_kaimings_normal_distribution():
    torch.manual_seed(0)
    net = make_network("cifar_resnet32", 1000)
    for weight, fan_in in (
        (net.conv1.weight, 27),
        (net.layer3[1].conv1.weight, 576),
        (net.fc.weight, 64),
    ):
        std = (2 / fan_in) ** 0.5
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert weight.abs().max() > 2.5 * std  # a uniform distribution ends at 1.7


def test_resnet18_is_torchvisions_with_a_small_stem():
    net = make_network("cifar_resnet18", 10).eval()
    assert isinstance(net, tv.ResNet)
    assert (net.conv1.kernel_size, net.conv1.stride) == ((3, 3), (1, 1))
    with torch.no_grad():
        assert net.layer1(net.maxpool(net.conv1(images()))).shape == (2, 64, 32, 32)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet18"])
def test_channels_last_and_autocast_reach_every_stage(name):
    torch.manual_seed(0)
    net = make_network(name, 10).eval()
    with torch.no_grad():
        expected = net(images())
        net.to(memory_format=torch.channels_last)
        layouts = []
        for child in list(net.children())[:-1]:
            child.register_forward_hook(lambda module, args, out: layouts.append(out))
        x = images().contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
        maps = [out for out in layouts if out.ndim == 4 and out.shape[2] > 1]
        assert len(maps) >= 5
        assert all(out.is_contiguous(memory_format=torch.channels_last) for out in maps)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(
        low.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item()
    )


def test_gradients_reach_every_parameter():
    net = make_network("cifar_resnet20", 10)
    net(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_one_graph_without_breaks():
    net = make_network("cifar_resnet20", 10).eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), net(images()))


@pytest.mark.parametrize(("name", "side"), [("cifar_resnet32", 8), ("cifar_resnet18", 4)])
def test_grad_cam_finds_its_layer(name, side):
    torch.manual_seed(0)
    maps = GradCAM(make_network(name, 10))(images(), torch.tensor([3, 1]))
    assert maps.shape == (2, side, side)


def test_bad_names_and_sizes():
    told = r"torchvision or one of cifar_resnet20, .*got 'resnet32'; did you mean .*resnet34"
    with pytest.raises(ValueError, match=told):
        make_network("resnet32", 10)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        make_network("cifar_resnet32", 0)
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 with n >= 1, got 34; .* 32, 44"):
        CifarResNet(34, 10)
    with pytest.raises(ValueError, match="got 2;"):
        CifarResNet(2, 10)


def same_weights(one, other):
    own, theirs = one.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[k], theirs[k]) for k in own)


def test_a_network_of_timm_is_the_one_that_timm_makes():
    torch.manual_seed(0)
    net = make_network("timm:resnet10t", 7)
    torch.manual_seed(0)
    assert same_weights(net, timm.create_model("resnet10t", num_classes=7))
    assert net.eval()(images()).shape == (2, 7)


def test_a_wrong_name_of_timm_is_answered_with_the_right_one():
    with pytest.raises(
        ValueError, match=r"model 'timm:resnet10tt' is no network of timm .* mean timm:resnet10t "
    ):
        make_network("timm:resnet10tt", 7)


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    told = "model 'timm:resnet18' needs the package timm, which is not installed: pip install timm"
    with pytest.raises(ValueError, match=told):
        make_network("timm:resnet18", 7)


MINE = """
from torch import nn

number = 3


def small(num_classes, width=5):
    return nn.Linear(width, num_classes)


def two(classes):
    return nn.Linear(3, classes)


def nothing(num_classes):
    return num_classes


def raises(num_classes):
    return nn.Linear({}["width"], num_classes)


def refuses(num_classes):
    raise ValueError(f"not {num_classes}")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package of the user's, `mine_of_tests`, on the path."""
    package = tmp_path / "mine_of_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "networks.py").write_text(MINE)
    (package / "broken.py").write_text("import no_such_package_of_tests")
    (package / "wrong.py").write_text("raise ValueError(17)")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine_of_tests"
    for name in [name for name in sys.modules if name.startswith("mine_of_tests")]:
        del sys.modules[name]


def test_a_function_of_the_users_own_module(mine):
    net = make_network(f"{mine}.networks:small", 7)
    assert (net.in_features, net.out_features) == (5, 7)


def test_a_function_that_takes_keywords_alone():
    assert make_network("torchvision.models:squeezenet1_1", 7).num_classes == 7


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{}.network:small", "there is no module 'mine_of_tests.network'; put its folder on PYTH"),
        ("no_such_one:small", "there is no module 'no_such_one'; put its folder on PYTHONPATH"),
        (":small", "there is no module ''; put"),
        (".networks:small", "there is no module '.networks'; put"),
        ("{}.networks:large", "the module 'mine_of_tests.networks' has no function 'large'; write"),
        ("{}.networks:number", "has no function 'number'; write package.module:function"),
        ("{}.networks:", "has no function ''; write package.module:function"),
        ("{}.networks:two", r"is called with num_classes=7 alone, .* 'classes'.*; give it a param"),
        ("{}.networks:nothing", r"must return a torch.nn.Module, got int"),
    ],
)
def test_wrong_functions_are_refused(mine, name, told):
    with pytest.raises(ValueError, match=told) as caught:
        make_network(name.format(mine), 7)
    assert repr(name.format(mine)) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "told", "cause"),
    [
        ("broken:small", "your module '{}.broken' has raised ModuleNotFound", ModuleNotFoundError),
        ("wrong:small", "your module '{}.wrong' has raised ValueError: 17", ValueError),
        ("networks:raises", "your function 'raises' has raised KeyError: 'width'", KeyError),
        ("networks:refuses", "your function 'refuses' has raised ValueError: not 7", ValueError),
    ],
)
def test_an_error_of_the_users_own_code_says_whose_it_is_and_is_no_error_of_an_option(
    mine, name, told, cause
):
    """So it is not told in one line, but with its traceback."""
    with pytest.raises(RuntimeError, match=told.format(mine)) as caught:
        make_network(f"{mine}.{name}", 7)
    assert str(caught.value).startswith(f"model '{mine}.{name}': ")
    assert type(caught.value.__cause__) is cause


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "fc"),
        ("vgg11", "classifier.6"),
        ("vit_b_32", "heads.head"),
        ("swin_t", "head"),
        ("convnext_tiny", "classifier.2"),
        ("efficientnet_b0", "classifier.1"),
        ("mobilenet_v2", "classifier.1"),
        ("mobilenet_v3_small", "classifier.3"),
        ("densenet121", "classifier"),
        ("regnet_y_400mf", "fc"),
        ("shufflenet_v2_x0_5", "fc"),
        ("maxvit_t", "classifier.5"),
    ],
)
def test_classifier_of_torchvisions_networks(name, expected):
    if name == "regnet_y_400mf":  # it computes its widths, which the meta device can't
        net = tv.get_model(name, num_classes=10)
    else:
        with torch.device("meta"):
            net = tv.get_model(name, num_classes=10)
    found, module = classifier_of(net, 10)
    assert found == expected
    assert module is net.get_submodule(expected)
    assert module.out_features == 10


def test_classifier_of_our_networks_and_inside_a_scaled_head():
    net = make_network("cifar_resnet20", 10)
    assert classifier_of(net, 10) == ("fc", net.fc)
    linear = net.fc
    net.fc = ScaledLinear(linear)
    assert classifier_of(net, 10) == ("fc.linear", linear)


def test_the_last_of_several_layers_with_as_many_outputs():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    assert classifier_of(net, 5) == ("1", net[1])


def test_no_classifier_is_refused_with_what_there_is():
    with torch.device("meta"):
        squeezenet, resnet = tv.squeezenet1_0(num_classes=10), tv.resnet18(num_classes=100)
    with pytest.raises(
        ValueError, match=r"of SqueezeNet, .* are: none; take a .* such as resnet50"
    ):
        classifier_of(squeezenet, 10)
    with pytest.raises(ValueError, match=r"classifier of 10 outputs; .* are: fc \(100\); "):
        classifier_of(resnet, 10)


class Trained(nn.Module):
    """8 px images -> 3 logits, and `of_training` of them in train mode."""

    def __init__(self, of_training=lambda logits: logits, features=None):
        super().__init__()
        self.features = features or nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc, self.of_training = nn.Linear(4, 3), of_training

    def forward(self, x):
        logits = self.fc(self.features(x).mean((2, 3)))
        return self.of_training(logits) if self.training else logits


def fits(net, train=True, **more):
    more |= {"train": net.train if train else None}
    check_fits(net, "mine", 8, 3, torch.device("cpu"), **more)


def missing(logits):
    raise KeyError("targets")


@pytest.mark.parametrize(
    ("of_training", "told"),
    [
        (
            lambda logits: (logits, logits),
            "in training too, got tuple for a batch of 2; make its f",
        ),
        (lambda logits: {"out": logits, "aux": logits}, "in training too, got dict for a"),
        (lambda logits: logits[:, None], r"in training too, got \(2, 1, 3\) for a"),
        (lambda logits: logits.detach(), "gives logits without a gradient: its forward must not"),
        (
            missing,
            r"not a batch of 2 in training \(KeyError: 'targets'\); mend its forward, or give",
        ),
    ],
)
def test_a_network_that_cannot_be_trained_is_told_and_serves_to_validate(of_training, told):
    net = Trained(of_training)
    with pytest.raises(ValueError, match=f"model 'mine' .*{told}"):
        fits(net)
    assert net.training
    fits(net, train=False)


def test_the_batches_that_a_network_is_trained_with_decide():
    by_four = Trained(lambda logits: torch.cat(logits.reshape(4, -1, 3).unbind()))
    fits(by_four, batch_size=8)
    with pytest.raises(ValueError, match=r"not a batch of 6 in training .*another batch_size"):
        fits(by_four, batch_size=6)
    pooled = Trained(features=nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)))
    fits(pooled, batch_size=2)
    with pytest.raises(
        ValueError, match=r"not a batch of 1 in training \(ValueError: Expected more"
    ):
        fits(pooled, batch_size=1)


def test_a_second_stage_is_tried_as_it_is_trained():
    net = Trained(lambda logits: (logits, logits)).requires_grad_(False)
    net.fc.requires_grad_(True)
    second = SecondStageConfig(classifier="tune", weights="w.pt")
    train = partial(set_train_mode, net, second)
    check_fits(net, "mine", 8, 3, torch.device("cpu"), train=train)
    assert net.training


class Changing(nn.Module):
    """A layer that its first batch in train mode changes in every way."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls, self.seen = nn.Parameter(torch.full((4, 1, 1), 2.0)), 0, None
        self.register_buffer("total", torch.tensor(5.0))
        self.register_buffer("last", torch.tensor(7.0), persistent=False)
        self.register_buffer("later", None)
        self.register_buffer("wide", torch.tensor(3.0).expand(4))  # nothing can write it

    def forward(self, x):
        if self.training:
            if not self.calls:
                self.scale.data.fill_(x.sum() + 3)
            self.calls, self.seen, self.extra = self.calls + 1, x, 1
            self.total.data.add_(1)
            self.last, self.later = self.last + 1, x.detach()
            self.register_buffer("new", torch.ones(1))
            self.eval()
        return torch.nn.functional.dropout(x * self.scale, 0.5)


@pytest.mark.parametrize("train", [True, False])
def test_a_trial_leaves_no_trace(train):
    layer = Changing()
    net = Trained(features=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), layer))
    net.fc.eval()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    modes, names = [m.training for m in net.modules()], set(vars(layer))
    torch.manual_seed(4)
    fits(net, train=train)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(4)))
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensors[name] for name in after)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert modes == [m.training for m in net.modules()]
    assert set(vars(layer)) == names
    assert (layer.calls, layer.seen, layer.later) == (0, None, None)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Lazy modules")
def test_scripted_and_lazy_networks_are_tried():
    layers = nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)
    scripted = torch.jit.script(nn.Sequential(*layers))
    fits(scripted)
    assert getattr(scripted, "1").num_batches_tracked == 0
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    fits(lazy)
    assert lazy[1].weight.shape == (3, 192)


@pytest.mark.parametrize(
    ("convert", "kinds"),
    [
        (lambda net: net.fc.bfloat16(), "bfloat16 and float32"),
        (lambda net: net.features.half(), "float16 and float32"),
        (lambda net: net.double(), "float64"),
    ],
)
def test_types_of_weights_are_told_and_autocast_mends_what_it_can(convert, kinds):
    net = Trained()
    convert(net)
    told = f"its weights are {kinds} and images are float32: give the amp that it needs, or make"
    with pytest.raises(ValueError, match=f"does not take images of 8 x 8 px .*; {told}"):
        fits(net)
    if kinds.startswith("bfloat16"):
        fits(net, amp="bf16")
    net.float()
    fits(net)
