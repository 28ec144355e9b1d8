"""The networks that can be trained, by name: torchvision's, timm's, the user's own, and some for
images of 32 px.

The last are ResNet-20 to 56 of He et al. (2016, sec. 4.2), where ResNet-32 is the usual one for
long-tailed data, and the ResNet-18 of ImageNet with a stem for 32 px.
"""

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from scae_dali.checks import check
from scae_dali.saliency.isolation import isolated
from scae_dali.training.precision import autocast

MODELS = (
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet18",
)


def make_network(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A classification network with random weights: float [B,3,H,W] -> logits [B,num_classes].

    name: one of `MODELS`, for images of 32 px, a classification network of torchvision, `timm:NAME`
    for one of timm, or `package.module:function` for the user's own function, which is called with
    num_classes=… and returns the network. Networks of torchvision with auxiliary classifiers are
    made without them, so that the logits are the only output. image_size: side of the images in
    pixels, which vision transformers of torchvision are made for; None: 224. Raises ValueError for
    another name, for num_classes < 1, and for an image_size that the patches do not divide.
    """
    check(num_classes >= 1, f"num_classes must be at least 1, got {num_classes}")
    package, colon, inner = name.partition(":")
    if package == "timm" and colon:
        return _of_timm(inner, num_classes)
    if colon:
        return _of_user(package, inner, num_classes)
    if name == "cifar_resnet18":
        return _resnet18(num_classes)
    if name in MODELS:
        return CifarResNet(int(name.removeprefix("cifar_resnet")), num_classes)
    known = torchvision.models.list_models(torchvision.models)
    close = difflib.get_close_matches(name, [*known, *MODELS])
    check(
        name in known,
        f"model must be a classification network of torchvision or one of {', '.join(MODELS)}, got "
        f"{name!r}; did you mean {' or '.join(close) or 'resnet50'}? timm:NAME is a network of "
        "timm, and package.module:function one of your own",
    )
    more: dict[str, Any] = {}
    if name.startswith("vit_") and image_size is not None:
        more = {"image_size": image_size}
    if name in ("googlenet", "inception_v3"):
        more = {"aux_logits": False, "init_weights": True}
    try:
        return torchvision.models.get_model(name, num_classes=num_classes, **more)
    except AssertionError as error:  # torch._assert
        raise ValueError(
            f"model {name!r} cannot be made for images of {image_size} px ({error}); give a "
            "multiple of 32 as image.size (scae-dali: --size), or 224"
        ) from error


def check_fits(
    net: nn.Module,
    name: str,
    size: int,
    num_classes: int,
    device: torch.device,
    *,
    amp: str = "none",
    train: Callable[[], object] | None = None,
    batch_size: int = 2,
) -> None:
    """Raise ValueError where the network does not turn images of size x size pixels into logits.

    The network, which is on the device, and torch's random state are left as they are. amp: see
    `autocast`. train: sets the network's modules to the modes that it is trained in, in which it is
    then tried too, with a gradient; None: it is not trained. batch_size: of the training.
    """
    of = f"model {name!r}"
    images = f"images of {size} x {size} px"
    advice = "give another size (224 fits most), or another model"
    kinds = {p.dtype for p in net.parameters() if p.is_floating_point()}
    if not kinds <= {torch.float32}:
        told = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        advice = (
            f"its weights are {told} and images are float32: give the amp that it needs, or make "
            f"all weights float32 (net.float()). If that is not why, {advice}"
        )

    def forward(batch: int) -> Any:
        return net(torch.zeros(batch, 3, size, size, device=device))

    def check_logits(logits: Any, batch: int, more: str, advice: str) -> None:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        check(
            shape == (batch, num_classes),
            f"{of} must give logits [B, {num_classes}] for images [B, 3, {size}, {size}]{more}, "
            f"got {shape} for a batch of {batch}; {advice}",
        )

    own_random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with own_random, autocast(amp, device):
        with isolated(net, device.type):
            try:
                logits = forward(2)
            except Exception as error:  # whatever its layers raise
                raise ValueError(
                    f"{of} does not take {images} ({_reason(error)}); {advice}"
                ) from error
        check_logits(logits, 2, "", advice)
        if train is None:
            return
        # Compiled for a batch of 2, parts of the network would be compiled again for the others.
        with _kept(net), torch.compiler.set_stance("force_eager"), torch.enable_grad():
            train()
            batch = min(2, batch_size)
            try:
                try:
                    logits = forward(batch)
                except Exception:  # it may take a batch apart, into 4 parts for example
                    batch = batch_size
                    logits = forward(batch)
            except Exception as error:
                raise ValueError(
                    f"{of} takes {images} in eval mode, and not a batch of {batch} in training "
                    f"({_reason(error)}); mend its forward, or give another batch_size or model"
                ) from error
        remedy = "make its forward return the logits alone, without those of auxiliary classifiers"
        check_logits(logits, batch, " in training too", remedy)
        check(
            logits.requires_grad,
            f"{of} gives logits without a gradient: its forward must not detach them, and must use "
            "parameters with requires_grad=True",
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextlib.contextmanager
def _kept(net: nn.Module) -> Iterator[None]:
    """A context at whose end the network's parameters, buffers, attributes and modes are as at its
    beginning.

    BatchNorm counts the batches, and other layers set their parameters by the first one.
    """
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in net.modules()]
    tensors = [one for one in (*net.parameters(), *net.buffers()) if not _expanded(one)]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for module, attributes, buffers in modules:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)
            for name in set(module._buffers.keys()) - set(buffers):
                del module._buffers[name]
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def _expanded(tensor: Tensor) -> bool:
    """Whether values share a place in memory, so that nothing can write them."""
    if tensor.layout != torch.strided:
        return False
    return any(
        not step and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _of_timm(name: str, num_classes: int) -> nn.Module:
    """A network of timm, by the name that timm.create_model takes."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model 'timm:{name}' needs the package timm, which is not installed: pip install timm"
        ) from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models())
        raise ValueError(
            f"model 'timm:{name}' is no network of timm {timm.__version__}; did you mean "
            f"{' or '.join(f'timm:{one}' for one in close) or 'timm:resnet50'}?"
        )
    return timm.create_model(name, num_classes=num_classes)


def _of_user(module: str, function: str, num_classes: int) -> nn.Module:
    """What the user's function makes.

    An error of its own becomes the cause of a RuntimeError, which says whose function it was.
    """
    name = f"{module}:{function}"
    try:
        maker = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        absent = getattr(error, "name", None) or ""
        nameless = not module or module.startswith(".")
        if nameless or (
            isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{absent}.")
        ):
            raise ValueError(
                f"model {name!r}: there is no module {absent or module!r}; put its folder on "
                "PYTHONPATH"
            ) from error
        raise _of_their_own(f"model {name!r}: your module {module!r}", error) from error
    if not callable(maker):
        raise ValueError(
            f"model {name!r}: the module {module!r} has no function {function!r}; write "
            "package.module:function"
        )
    try:
        inspect.signature(maker).bind(num_classes=num_classes)
    except TypeError as error:
        raise ValueError(
            f"model {name!r} is called with num_classes={num_classes} alone, which it does not "
            f"take ({error}); give it a parameter num_classes, and defaults to all others"
        ) from error
    try:
        net = maker(num_classes=num_classes)
    except Exception as error:
        raise _of_their_own(f"model {name!r}: your function {function!r}", error) from error
    check(
        isinstance(net, nn.Module),
        f"model {name!r} must return a torch.nn.Module, got {type(net).__name__}",
    )
    return net


def _of_their_own(whose: str, error: Exception) -> RuntimeError:
    """The error that stands for one of the user's code, whose traceback is above it."""
    return RuntimeError(f"{whose} has raised {type(error).__name__}: {error}")


def _resnet18(num_classes: int) -> nn.Module:
    """The ResNet-18 of ImageNet, with a stem that does not reduce the image."""
    net = torchvision.models.resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers and widths 16-32-64, with shortcuts without parameters (option A).

    Convolutions and classifier start from Kaiming's normal distribution (fan in, gain √2), as in
    LDAM-DRW and MiSLAS. Maps of 32 px images: 32², 16² and 8² after `layer1`, `layer2` and
    `layer3`. Raises ValueError for a depth that is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        check(
            blocks >= 1 and rest == 0,
            f"depth must be 6n + 2 with n >= 1, got {depth}; the paper's are 20, 32, 44, 56, 110",
        )
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """images: float [B,3,H,W] -> logits [B,num_classes]."""
        x = relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))  # [B,64,H/4,W/4] -> [B,64]


class _Block(nn.Module):
    """Two 3x3 convolutions beside the identity; a wider block halves the map."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = 1 if width == width_in else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pad = (width - width_in) // 2  # zero channels on either side

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return relu(y + x)


def _stage(width_in: int, width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(width_in, width), *(_Block(width, width) for _ in range(blocks - 1))
    )


def compiler_failed(error: RuntimeError) -> bool:
    """Whether an error is of torch.compile, which compiles a network in its first step. Its classes
    are in modules that are long to import."""
    return type(error).__module__.startswith(("torch._dynamo.", "torch._inductor."))
