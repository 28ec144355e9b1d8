"""Whether the logits have a gradient at a layer, without which every Grad-CAM map of it is zero.

Behind the last attention of a transformer only the class token goes on to the head: the patches'
gradient is zero there, whatever the weights and images, so that another layer must be taken. A
gradient may also be zero because of the weights (a classifier that starts from zero): then the
network must be trained first. To tell these cases apart, zero weights are replaced by noise.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scae_dali.saliency.layout import Layout, leading_tokens, of_tokens, readings

__all__ = [
    "inference_told",
    "leaf_of",
    "logits_of",
    "reached",
    "require_finite",
    "serving",
    "zero_weights",
]

# Keeps fp16 gradients out of the subnormal range, as in `gradcam`.
_SCALE = 1024.0


def leaf_of(output: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output as a leaf of the graph, and a copy of it for the head to read.

    Some heads change their input in place, which a leaf does not allow. Both require gradients,
    even where the network switches them off.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = output.clone() if output.is_inference() else output.detach()
        return leaf.requires_grad_(), leaf.clone()


@contextlib.contextmanager
def inference_told(model: nn.Module) -> Iterator[None]:
    """A context that raises ValueError where the head needs a gradient of an inference tensor."""
    try:
        yield
    except RuntimeError as error:
        if "Inference tensors" not in str(error):
            raise
        raise ValueError(
            f"a part of {type(model).__name__} runs under torch.inference_mode, which no gradient "
            "comes through; use torch.no_grad there, or pass the layer whose output leaves the part"
        ) from error


def reached(
    model: nn.Module,
    module: nn.Module,
    layout: Layout,
    images: Tensor,
    *,
    weights: Mapping[str, Tensor] | None = None,
    features: bool = True,
) -> bool:
    """Whether any logit has a gradient anywhere in the layer's map, for any of the images.

    weights: by name, instead of the model's own. features: False puts noise in place of the layer's
    output, so that the answer is about what follows the layer alone. Call it in `isolated`.
    """
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        value = output if features else _noise(tuple(output.shape), output)
        leaf, copy = leaf_of(value)
        leaves.append(leaf)
        torch.set_grad_enabled(True)  # for the layers behind, even if the network forbids a graph
        return copy

    handle = module.register_forward_hook(cut)
    try:
        with torch.enable_grad(), inference_told(model):
            logits = logits_of(torch.func.functional_call(model, dict(weights or {}), (images,)))
            if not logits.requires_grad:
                return False
            cotangent = _SCALE * _noise(tuple(logits.shape), logits)
            (gradient,) = torch.autograd.grad(logits, leaves[-1:], cotangent, allow_unused=True)
    finally:
        handle.remove()
    return gradient is not None and bool((layout.maps(gradient) != 0).any())


def zero_weights(model: nn.Module) -> dict[str, Tensor]:
    """Noise in place of every parameter that is zero throughout, by name, in the model's order."""
    return {
        name: 0.02 * _noise(tuple(parameter.shape), parameter)
        for name, parameter in model.named_parameters()
        if not parameter.detach().any()
    }


def require_finite(model: nn.Module, *, infinite_buffers: bool = True) -> None:
    """Raises ValueError that names a parameter or a buffer with values that are not finite.

    infinite_buffers: whether infinite values in a buffer count; some buffers are masks.
    """
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point():
            continue
        buffer = not isinstance(value, nn.Parameter)
        wrong = value.isnan() if buffer and not infinite_buffers else ~value.isfinite()
        if wrong.any():
            raise ValueError(
                f"{name!r} of {type(model).__name__} holds values that are not finite, so it gives "
                "no maps: the network has diverged; take the weights of an earlier epoch"
            )


def serving(model: nn.Module, images: Tensor) -> dict[str, tuple[tuple[int, ...], Layout]]:
    """The layers whose Grad-CAM maps are not flat, the last to run first, with the shapes of their
    outputs and how these are read. The maps are those of a random sum of the logits.

    images: float[B,3,H,W]. Empty where the network does not run with them. Call it in `isolated`.
    """
    runs: Counter[str] = Counter()
    convolved: list[tuple[int, int]] = []
    found: list[tuple[str, Tensor, Layout]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            runs[name] += 1
            if not isinstance(output, Tensor) or output.ndim not in (3, 4):
                return None
            if len(output) != len(images):
                return None
            if isinstance(module, nn.Conv2d) and output.ndim == 4:
                convolved.append((output.shape[2], output.shape[3]))
            size = (images.shape[2], images.shape[3])
            # The shape alone does not show [B,C,N], nor tell a map from an attention matrix.
            layouts = [
                layout
                for layout in readings(tuple(output.shape), size, leading, convolved)
                if layout.axes != "[B,C,N]"
                and not (output.ndim == 4 and of_tokens(layout, size, leading, convolved))
            ]
            if not layouts or not output.requires_grad:
                return None
            # What an identity gives is its input, which others may read too.
            output = output.clone()
            found.append((name, output, layouts[0]))
            return output

        return hook

    leading = leading_tokens(model)
    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    weights = zero_weights(model)
    try:
        with torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            logits = logits_of(torch.func.functional_call(model, weights, (leaf.clone(),)))
            gradients = torch.autograd.grad(
                logits,
                [output for _, output, _ in found],
                _SCALE * _noise(tuple(logits.shape), logits),
                allow_unused=True,
            )
    except Exception:  # the search is for an error's remedy; the network may take other images
        return {}
    finally:
        for handle in handles:
            handle.remove()
    serve: dict[str, tuple[tuple[int, ...], Layout]] = {}
    for (name, output, layout), gradient in reversed(list(zip(found, gradients, strict=True))):
        if gradient is None or runs[name] > 1 or layout.grid == (1, 1):
            continue
        if not _flat(layout.maps(output.detach()), layout.maps(gradient)):
            serve[name] = (tuple(output.shape), layout)
    return serve


def _flat(features: Tensor, slopes: Tensor) -> bool:
    """Whether the Grad-CAM map is the same everywhere, up to rounding, for a score and for its
    negative alike, in every image. features, slopes: float[B,C,h,w]."""
    rounding = 4 * torch.finfo(slopes.dtype).eps
    features, slopes = features.float(), slopes.float()
    alpha = slopes.mean((2, 3))
    # Slopes that cancel leave their rounding behind.
    cancelled = alpha.abs() <= max(rounding, 1e-5) * slopes.abs().mean((2, 3))
    alpha = alpha.masked_fill(cancelled, 0.0)
    weighted = (alpha[:, :, None, None] * features).sum(1)
    noise = rounding * (alpha.abs() * features.abs().amax((2, 3))).sum(1)
    return not bool((weighted.amax((1, 2)) - weighted.amin((1, 2)) > noise).any())


def logits_of(output: Any) -> Any:
    """The model's output, or its .logits."""
    return getattr(output, "logits", output)


def _noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal, the same at every call."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(like.device, like.dtype)
