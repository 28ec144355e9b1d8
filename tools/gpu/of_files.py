"""Checks of pipelines that read files, and of Grad-CAM.

Those whose name begins with an underscore test the runner and run only when named in full.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from scae_dali.methods import BUILT_IN
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.stage.loader import Batch, ids_of
from tools.gpu.checks import (
    BATCH,
    SEED,
    TENSORS,
    Setup,
    check,
    compare,
    execution,
    image_config,
    loaders,
    product,
    step,
    train_loader,
    users_own,
)

ERASING: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("random_erasing", {"prob": 1.0, "fill": "mean"}),
    "zero": ("random_erasing", {"prob": 1.0, "fill": "zero"}),
    "color": ("random_erasing", {"prob": 1.0, "fill": "color"}),
    "noise": ("random_erasing", {"prob": 1.0, "fill": "noise"}),
    "clip": ("scae", {"p_min": 1.0, "p_max": 1.0, "border": "clip"}),
    "partners": ("rand_augment+cmo", {"rand_augment": {"n": 1}}),
    # Pastes boxes of another image, some of which have no area.
    "kept": ("keep_augment", {"mode": "paste", "prob": 0.5}),
    "pasted": ("cutmix", {"alpha": 0.1}),
    "switched": ("mixup|cutmix", {}),
}
# Mean absolute difference of maps in [0, 1] that is allowed, by precision of the forward pass.
CAM = {"fp32": (None, 0.01), "fp16": (torch.float16, 0.02), "bf16": (torch.bfloat16, 0.05)}


@check(*product("train", BUILT_IN, ("roi", "full"), TENSORS))
def train_pipeline(setup: Setup, method: str, decode: str, tensor: str) -> str:
    what = (method, decode, tensor)
    reference = list(train_loader(setup, None, *what))
    details = []
    for backend in ("python", "torch"):
        step(f"backend {backend}")
        ours = list(train_loader(setup, setup.device_id, *what, backend=backend))
        details.append(f"{backend}: {compare(reference, ours)}")
    return "; ".join(details)


@check(*product("erase", ERASING))
def erasing(setup: Setup, what: str) -> str:
    method, settings = ERASING[what]
    reference = list(train_loader(setup, None, method, **settings))
    ours = list(train_loader(setup, setup.device_id, method, **settings))
    if settings.get("fill") != "noise":
        return compare(reference, ours)
    # No two devices have the same: compare how rough it is, and what is around it.
    rough, other = (
        np.nanmean([roughness(box) for box in erased(batches)]) for batches in (reference, ours)
    )
    assert abs(rough / other - 1) < 0.05, f"roughness of the noise is {other:.3f}, not {rough:.3f}"
    for box in [*erased(reference), *erased(ours)]:
        box[:] = 0
    return f"{compare(reference, ours)}; roughness of the noise {other:.3f}, {rough:.3f}"


def erased(batches: list[Batch]) -> Iterator[torch.Tensor]:
    """What is within the boxes of the images, [3, h, w] each, as views."""
    for batch in batches:
        for image, box, flip in zip(batch.images, batch.boxes, batch.flips, strict=True):
            y, x, h, w = box.int().tolist()
            left = image.shape[2] - x - w if flip else x  # the box is as before the flip
            yield image[:, y : y + h, left : left + w]


def roughness(box: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels: large for noise, 0 for one colour, NaN
    without neighbours."""
    return float(box.float().diff(dim=2).abs().mean())


@check(*product("val", TENSORS))
def val_pipeline(setup: Setup, tensor: str) -> str:
    def run(device_id: int | None) -> list[Batch]:
        return list(loaders(setup, tensor).val(execution(device_id)))

    return compare(run(None), run(setup.device_id))


@check(*product("saliency", TENSORS))
def saliency_pipeline(setup: Setup, tensor: str) -> str:
    ids = range(len(setup.index) - 1, -1, -1)  # a pass that resumes names its samples

    def run(device_id: int | None) -> list[Batch]:
        execute, image = execution(device_id), image_config(tensor)
        return list(loaders(setup, tensor).saliency(image, execute, ids))

    return compare(run(None), run(setup.device_id))


@check(*product("user", ("roi", "full"), ("number", "name")))
def user_pipeline(setup: Setup, decode: str, naming: str) -> str:
    """A user's own pipeline: the stage is called once, on images whose size it has to ask for."""
    settings: dict[str, Any] = {"p_min": 1.0, "p_max": 1.0}
    return compare(
        *(
            list(users_own(setup, where, decode, naming, **settings))
            for where in (None, setup.device_id)
        )
    )


@check("checkpoint")
def checkpoint(setup: Setup) -> str:
    whole = train_loader(setup, setup.device_id)
    list(whole)
    batches = iter(whole)
    next(batches)
    restored = train_loader(setup, setup.device_id, checkpoint=whole.state())
    return compare(list(batches), list(restored))


@check(*product("gradcam", CAM, ("contiguous", "channels_last")))
def gradcam(setup: Setup, precision: str, layout: str) -> str:
    from torchvision.models import resnet18

    torch.manual_seed(SEED)
    model = resnet18(num_classes=10).train()
    images, labels = torch.rand(BATCH, 3, 224, 224), torch.arange(BATCH)
    with torch.no_grad():  # so that BatchNorm has something to normalise by
        for _ in range(3):
            model(images)
    reference = GradCAM(model)(images, labels)
    dtype, allowed = CAM[precision]
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = model.to(setup.device, memory_format=memory)
    images = images.to(setup.device, memory_format=memory)
    with torch.autocast(torch.device(setup.device).type, dtype, enabled=dtype is not None):
        maps = GradCAM(model)(images, labels.to(setup.device)).cpu()
    difference = float((maps - reference).abs().mean())
    if not difference <= allowed or not float(reference.std()) > 0.05:
        raise AssertionError(f"maps differ by {difference:.4f} on average, allowed is {allowed}")
    return f"{BATCH} maps, mean |difference| {difference:.4f}"


@check(*product("every-image", ("roi", "full")))
def every_image(setup: Setup, decode: str) -> str:
    """Three epochs of all images, in another crop each time: looks for the one that crashes."""
    batches = train_loader(setup, setup.device_id, "none", decode)
    images = 0
    for batch in itertools.chain(batches, batches, batches):
        step(f"{images} images; next are {ids_of(batch).tolist()}")
        assert batch.images.isfinite().all(), f"not finite: ids {ids_of(batch).tolist()}"
        images += len(batch.images)
    return f"{images} images"


@check("_crash")
def crash(setup: Setup) -> str:
    os.abort()


@check("_hang")
def hang(setup: Setup) -> str:
    time.sleep(1 << 20)
    return ""


@check(*product("_differ", ("images", "boxes")))
def differ(setup: Setup, field: str) -> str:
    batches = list(train_loader(setup, None))
    return compare(batches, [replace(b, **{field: getattr(b, field) + 0.2}) for b in batches])
