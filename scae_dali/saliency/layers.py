"""Finds the layer that a saliency method looks at: by its name, or by the network's family.

It also finds the classifier, the network inside its wrappers, and a layer to recommend in an error.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scae_dali.saliency.isolation import isolated
from scae_dali.saliency.layout import Layout, layout_of
from scae_dali.saliency.probe import own_tensor, trial_images
from scae_dali.saliency.reach import serving

__all__ = ["classifier_of", "default_layer", "find_layer", "serving_layers", "unwrap"]

# By class name, so that subclasses and look-alikes (timm's ResNet) are found too. The first name
# that the network has counts, since networks of torchvision, timm and others share class names.
# "-1" is the last child of what precedes it.
_LAYERS = {
    "AlexNet": ("features",),
    "Beit": ("blocks.-1.norm1",),
    "ByobNet": ("final_conv",),
    "CifarResNet": ("layer3",),
    "ConvNeXt": ("features", "stages"),
    "DenseNet": ("features",),
    "EfficientNet": ("features", "bn2", "_bn1"),
    "Eva": ("blocks.-1.norm1",),
    "GoogLeNet": ("inception5b",),
    "Inception3": ("Mixed_7c",),
    "InceptionV3": ("Mixed_7c",),
    "MaxVit": ("blocks.-1",),
    "MaxxVit": ("norm",),
    "MNASNet": ("layers",),
    "MobileNetV2": ("features",),
    "MobileNetV3": ("features", "blocks"),
    "RegNet": ("trunk_output", "final_conv"),
    "ResNet": ("layer4",),
    "ResNetV2": ("norm",),
    "ShuffleNetV2": ("conv5",),
    "SqueezeNet": ("features",),
    "SwinTransformer": ("permute", "norm"),
    "SwinTransformerV2": ("norm",),
    "SwinTransformerV2Cr": ("stages",),
    "VGG": ("features",),
    # Past the last attention the patch tokens no longer reach the logits; before it they do.
    "VisionTransformer": ("encoder.layers.-1.ln_1", "blocks.-1.norm1"),
}


def default_layer(model: nn.Module) -> str:
    """Name of the last feature map of a classification network of torchvision or timm.

    Raises ValueError for a class that is not in the table, or that lacks the table's layer.
    """
    model = unwrap(model)
    name = _of_family(model)
    if name is None:
        raise ValueError(
            f"no default layer is known for {type(model).__name__}; pass layer=NAME, the "
            f"module whose output is the last feature map, such as {_suggestions(model)}"
        )
    return name


def find_layer(model: nn.Module, layer: str | None) -> tuple[str, nn.Module]:
    """Dotted name and module of `layer`; None: `default_layer(model)`.

    Raises ValueError for an unknown layer.
    """
    layer = default_layer(model) if layer is None else layer
    modules = dict(model.named_modules(remove_duplicate=False))
    if not layer or layer not in modules:
        close = difflib.get_close_matches(layer, modules, n=5, cutoff=0.4)
        raise ValueError(
            f"layer {layer!r} is no module of {type(model).__name__}; "
            f"did you mean {', '.join(close) or _suggestions(model)}?"
        )
    return layer, modules[layer]


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch, in any order."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def serving_layers(
    model: nn.Module, images: Tensor, channels: int, *, unlike: str = ""
) -> list[str]:
    """Up to two layers that were tried and whose maps are not flat: the default one, or else the
    last to run, and the last of another part of the network that has maps as coarse.

    images: float[B,3,H,W]. channels: prefer layers with so many, such as the width of a
    transformer. unlike: the layer that is not usable. Call it in `isolated`.
    """
    serve = serving(model, images)
    serve.pop(unlike, None)

    def usable(name: str) -> bool:
        shape, layout = serve[name]
        try:  # the shape alone may be read in several ways
            return layout_of(name, shape, images, model, model.get_submodule(name)) == layout
        except ValueError:
            return False

    default = _of_family(model)
    as_wide = [name for name, (shape, layout) in serve.items() if _width(shape, layout) == channels]
    order = dict.fromkeys([*([default] if default in serve else []), *as_wide, *serve])
    best = next(filter(usable, order), None)
    if best is None:
        return []
    others = (
        name
        for name, (_, layout) in serve.items()
        if layout.grid == serve[best][1].grid and name.split(".")[0] != best.split(".")[0]
    )
    return [best, *itertools.islice(filter(usable, others), 1)]


def _width(shape: tuple[int, ...], layout: Layout) -> int:
    """Channels of a layer's maps. shape: of its output."""
    return shape[1] if layout.axes == "[B,C,h,w]" else shape[-1]


def _of_family(model: nn.Module) -> str | None:
    """The table's layer for the model's class, or for one of its base classes."""
    for cls in type(model).__mro__:
        for pattern in _LAYERS.get(cls.__name__, ()):
            name = _resolve(model, pattern)
            if name:
                return name
    return None


def _resolve(model: nn.Module, pattern: str) -> str:
    """Module name of a pattern of `_LAYERS`, or "" where the model has no such module."""
    names: list[str] = []
    for part in filter(None, pattern.split(".")):
        children = [name for name, _ in model.named_children()]
        name = children[-1] if part == "-1" and children else part
        if name not in children:
            return ""
        names.append(name)
        model = model.get_submodule(name)
    return ".".join(names)


def _suggestions(model: nn.Module) -> str:
    """A few names for an error: layers that gave maps in a trial, or else likely ones."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    channels = linear[-1].in_features if linear else 0
    device = own_tensor(model).device.type
    if device != "meta":
        for size in _sizes(model):
            with isolated(model, device):
                names = serving_layers(model, trial_images(model, size), channels)
            if names:
                return " or ".join(names)
    return ", ".join(_candidates(model)) or "(it has none)"


def _sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """(H, W) of images that the network may take; timm's networks name theirs."""
    declared = getattr(model, "default_cfg", None)
    if isinstance(declared, dict) and "input_size" in declared:
        yield tuple(declared["input_size"][1:])
    yield from ((side, side) for side in (224, 64, 32))


def _candidates(model: nn.Module) -> list[str]:
    """The last top-level modules with weights, and the last convolution."""
    top = [
        name
        for name, child in model.named_children()
        if not isinstance(child, nn.Linear) and next(child.parameters(), None) is not None
    ]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return list(dict.fromkeys(filter(None, top[-4:] + convolutions[-1:])))


def classifier_of(net: nn.Module, num_classes: int) -> tuple[str, nn.Linear]:
    """Dotted name and module of the last linear layer with num_classes outputs.

    The last one registered is the classifier in torchvision's networks. Names are those inside
    `net`, so unwrap DistributedDataParallel and the like first. Raises ValueError if there is none.
    """
    linear = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    for name, module in reversed(linear):
        if module.out_features == num_classes:
            return name, module
    found = ", ".join(f"{name} ({m.out_features})" for name, m in linear[-3:]) or "none"
    raise ValueError(
        f"net must have a linear classifier of {num_classes} outputs; the last linear layers of "
        f"{type(net).__name__}, with their outputs, are: {found}; take a network that ends in one, "
        "such as resnet50, or make it with that number of classes"
    )
