"""Which layer of a network a saliency method looks at: by its name, or by the network's family.

Decides the default and what a wrapped network's names are. Whether the layer gives a map, and what
becomes of it, is for `cam`.
"""

from __future__ import annotations

import difflib

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["default_layer", "find_layer", "unwrap"]

# By class name, so that subclasses and look-alikes (timm's ResNet) are served too. "-1" is the
# last child of what precedes it.
_LAYERS = {
    "AlexNet": "features",
    "CifarResNet": "layer3",
    "ConvNeXt": "features",
    "DenseNet": "features",
    "EfficientNet": "features",
    "GoogLeNet": "inception5b",
    "Inception3": "Mixed_7c",
    "MaxVit": "blocks.-1",
    "MNASNet": "layers",
    "MobileNetV2": "features",
    "MobileNetV3": "features",
    "RegNet": "trunk_output",
    "ResNet": "layer4",
    "ShuffleNetV2": "conv5",
    "SqueezeNet": "features",
    "SwinTransformer": "permute",  # the blocks before it are [B,h,w,C]
    "VGG": "features",
    # Past the last attention the patch tokens no longer reach the logits; before it they do.
    "VisionTransformer": "encoder.layers.-1.ln_1",
}


def default_layer(model: nn.Module) -> str:
    """Name of the last feature map of a torchvision classification network, by its family.

    Raises ValueError for a class that is not in the table, or that lacks the table's layer.
    """
    model = unwrap(model)
    for cls in type(model).__mro__:
        name = _resolve(model, _LAYERS.get(cls.__name__, ""))
        if name:
            return name
    raise ValueError(
        f"no default layer is known for {type(model).__name__}; pass layer=NAME, the "
        f"module whose output is the last feature map, such as {', '.join(_candidates(model))}"
    )


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
            f"did you mean {', '.join(close or _candidates(model))}?"
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


def _candidates(model: nn.Module) -> list[str]:
    """A few names for an error: the last top-level modules with weights, the last convolution."""
    top = [
        name
        for name, child in model.named_children()
        if not isinstance(child, nn.Linear) and next(child.parameters(), None) is not None
    ]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return list(dict.fromkeys(filter(None, top[-4:] + convolutions[-1:]))) or ["(it has none)"]
