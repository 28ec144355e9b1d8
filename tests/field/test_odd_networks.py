"""Networks that are not as most are: without weights, with one channel, with unusual tensors.

`next(model.parameters())` of a network that has none is a bare StopIteration, as in
https://github.com/pytorch/pytorch/issues/7460 and its many followers. Quantized and exported
networks have buffers alone. The others were found by trying.
"""

import pytest
import torch
from torch import nn

from scae_dali import SCAE
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.layers import default_layer
from scae_dali.saliency.scorecam import ScoreCAM
from scae_dali.saliency.weights import weights_digest


class Frozen(nn.Module):
    """Weights as buffers, as of an exported network; `kind` converts them."""

    def __init__(self, classes=5, kind=torch.Tensor.float):
        super().__init__()
        self.features = nn.AvgPool2d(4)
        torch.manual_seed(0)
        self.register_buffer("weight", kind(5 * torch.randn(classes, 3)))

    def forward(self, x):
        return self.features(x).mean((2, 3)) @ self.weight.to(x.dtype).T


def convolutional(channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Functional(nn.Module):
    """A network of one channel, without a module that says so."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.features, self.fc = nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.features(nn.functional.conv2d(x, self.kernel)).mean((2, 3)))


@pytest.mark.parametrize("cam", [GradCAM, ScoreCAM])
@pytest.mark.parametrize("kind", [torch.Tensor.float, torch.Tensor.double, torch.Tensor.short])
def test_the_grid_of_a_network_without_parameters(cam, kind):
    assert cam(Frozen(kind=kind), "features").grid((32, 48)) == (8, 12)


def test_the_grid_of_a_network_without_any_tensor():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.MaxPool2d(8)

        def forward(self, x):
            return self.features(x).mean((2, 3))

    assert GradCAM(Bare(), "features").grid(32) == (4, 4)
    with pytest.raises(ValueError, match="layer"):  # and no StopIteration
        default_layer(Bare())


def test_a_stage_refreshes_by_a_network_without_parameters(index, tmp_path):
    settings = {"epochs": 2, "batch_size": 10, "seed": 0, "refresh_every": 1, "mix_prob": 0.0}
    scae = SCAE(index, tmp_path / "maps.lmdb", **settings)
    model = Frozen(index.num_classes)
    assert scae.refresh(model, 1, layer="features", size=32).images == len(index)
    assert scae._lookup.cache.meta.grid == (8, 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("cam", [GradCAM, ScoreCAM])
def test_the_grid_of_networks_for_other_images_than_rgb(cam, channels):
    one = cam(convolutional(channels), "0")
    assert one.grid(33) == (16, 16)
    assert one(torch.randn(2, channels, 33, 33), torch.tensor([1, 4])).shape == (2, 16, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_harvest_of_networks_for_other_images_than_rgb(channels):
    model = convolutional(channels)
    Harvest(model, "1", samples=10, num_classes=5, grid=(16, 16), size=33)


def test_images_that_a_network_does_not_take_are_told():
    with pytest.raises(
        ValueError, match=r"size must be .* Functional takes, got 32 x 32 .* 3 chan"
    ):
        GradCAM(Functional(), "features").grid(32)
    with pytest.raises(ValueError, match=r"size must be one that Sequential takes, got 2 x 9 pixe"):
        GradCAM(convolutional(3), "0").grid((2, 9))


@pytest.mark.parametrize("error", [AssertionError, IndexError, TypeError, KeyError])
def test_whatever_a_network_says_to_images_of_another_size_is_told(error):
    class Strict(Frozen):
        def forward(self, x):
            if x.shape[-1] != 32:
                raise error("Wrong image width!")
            return super().forward(x)

    assert GradCAM(Strict(), "features").grid(32) == (8, 8)
    with pytest.raises(ValueError, match=rf"got 64 x 64 .*{error.__name__}: .*Wrong image width"):
        GradCAM(Strict(), "features").grid(64)


def quantized(value):
    return torch.quantize_per_tensor(value.abs(), 0.1, 0, torch.quint8)


KINDS = {
    "int64": torch.Tensor.long,
    "bool": torch.Tensor.bool,
    "bfloat16": torch.Tensor.bfloat16,
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "complex": lambda value: value + 1j * value,
    "conjugate": lambda value: (value + 1j * value).conj(),
    "quantized": quantized,
    "sparse": torch.Tensor.to_sparse,
    "sparse rows": torch.Tensor.to_sparse_csr,
    "transposed": lambda value: value.T,
    "expanded": lambda value: value[0].expand(4, 3),
    "no values": lambda value: value[:0],
    "one value": lambda value: value[0, 0],
}


@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*quantize")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_has_a_digest(kind):
    value = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])

    def digest(value):
        model = nn.Module()
        model.register_buffer("value", KINDS[kind](value))
        return weights_digest(model)

    assert digest(value) == digest(value.clone())
    if kind != "no values":
        assert digest(value) != digest(value * (value != 1))
