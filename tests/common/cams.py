"""Networks and references for class activation maps, and that a network is left as it was."""

import torch
import torchvision.models as tv
from torch import nn

CLASSES = 10


def settle(model, size, batch=4):
    """BatchNorm statistics of random weights, so that the features are of order 1."""
    generator = torch.Generator().manual_seed(1)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of the batches; at 0.01 three of them settle nothing
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(batch, 3, size, size, generator=generator))
    return model.eval()


_MODELS: dict[tuple[str, int], nn.Module] = {}


def network(name, size=96):
    """A torchvision network with random weights; one instance a name, so do not change it."""
    if (name, size) not in _MODELS:
        torch.manual_seed(0)
        plain = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        _MODELS[name, size] = settle(getattr(tv, name)(num_classes=CLASSES, **plain), size)
    return _MODELS[name, size]


def pictures(model, size=96, batch=4):
    """Images, and the labels the model gives them: those have a positive score to explain."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return images, model(images).argmax(1)


def minmax(maps):
    """f64, for references."""
    a = maps.double().clamp_min(0)
    low, high = a.amin((1, 2), keepdim=True), a.amax((1, 2), keepdim=True)
    return torch.where(high > low, (a - low) / (high - low), 0.0)


class Net(nn.Module):
    """Small enough for tests of everything but the numbers."""

    def __init__(self, head=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.body = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.unused = nn.Conv2d(8, 6, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.head = head or nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.body(self.act(self.norm(self.act(self.stem(x)))))
        return self.head(self.drop(self.pool(x).flatten(1)))


def snapshot(model):
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "grads": [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [
            {key: len(value) for key, value in vars(module).items() if "hooks" in key}
            for module in model.modules()
        ],
        "attributes": [set(vars(module)) for module in model.modules()],
    }


def mixed_modes():
    """A network in the middle of training: mixed modes, frozen parts, some gradients."""
    torch.manual_seed(4)
    model = tv.resnet18(num_classes=CLASSES).train()
    model.layer1.eval()
    model.conv1.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.layer4.register_forward_hook(lambda *args: None)
    return model


def assert_same(found, expected):
    torch.testing.assert_close(found.pop("state"), expected.pop("state"), rtol=0, atol=0)
    torch.testing.assert_close(found.pop("grads"), expected.pop("grads"), rtol=0, atol=0)
    assert found == expected


def compiled(model):
    wrapper = torch.compile(model, backend="eager")
    assert isinstance(wrapper, nn.Module)
    return wrapper
