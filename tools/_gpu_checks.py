"""The checks that `gpu_check.py` runs: a registry of functions, each comparing a GPU with the CPU.

A check gets a Setup and the parts of its name, says what it found, and raises where that is wrong.
Those whose name begins with an underscore test the runner and run only when named in full.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def

import _path  # noqa: F401
from pipelines import saliency, train, val
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache.cache import SaliencyCache
from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.data.index import ImageIndex
from scae_dali.methods import BUILT_IN
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.stage.loader import Batch, Loader
from scae_dali.stage.stage import Stage

SEED = 7
BATCH = 8
GREY_LEVELS = 3.0  # mean absolute difference that is allowed in an image, of 255
TENSORS = {"fp32-NCHW": ("fp32", "NCHW"), "fp16-NHWC": ("fp16", "NHWC")}
ERASING: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("random_erasing", {"prob": 1.0, "fill": "mean"}),
    "zero": ("random_erasing", {"prob": 1.0, "fill": "zero"}),
    "color": ("random_erasing", {"prob": 1.0, "fill": "color"}),
    "noise": ("random_erasing", {"prob": 1.0, "fill": "noise"}),
    "clip": ("scae", {"p_min": 1.0, "p_max": 1.0, "border": "clip"}),
    # Boxes out of another image, some of them of no area.
    "kept": ("keep_augment", {"mode": "paste", "prob": 0.5}),
    "pasted": ("cutmix", {"alpha": 0.1}),
}
# Mean absolute difference of maps in [0, 1] that is allowed, by precision of the forward pass.
CAM = {"fp32": (None, 0.01), "fp16": (torch.float16, 0.02), "bf16": (torch.bfloat16, 0.05)}


@dataclass(frozen=True)
class Setup:
    """What a check works on. device_id: None is the CPU."""

    index: ImageIndex
    cache: SaliencyCache
    device_id: int | None

    @property
    def device(self) -> str:
        return "cpu" if self.device_id is None else f"cuda:{self.device_id}"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHECKS: dict[str, Callable[..., str]] = {}


def check(*names: str) -> Callable:
    """Register a check: function(setup, *the parts of the name after the first) -> detail."""

    def register(function: Callable[..., str]) -> Callable[..., str]:
        CHECKS.update(dict.fromkeys(names, function))
        return function

    return register


def product(first: str, *parts) -> Iterator[str]:
    return ("/".join(name) for name in itertools.product([first], *parts))


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
    """Mean absolute difference of neighbours: large in noise, 0 in what is of one colour; NaN where
    there are none."""
    return float(box.float().diff(dim=2).abs().mean())


@check(*product("val", TENSORS))
def val_pipeline(setup: Setup, tensor: str) -> str:
    def run(device_id: int | None) -> list[Batch]:
        pipeline = val.val_pipeline(setup.index, image_config(tensor), execution(device_id))
        return list(loader(setup, pipeline, val.OUTPUTS))

    return compare(run(None), run(setup.device_id))


@check(*product("saliency", TENSORS))
def saliency_pipeline(setup: Setup, tensor: str) -> str:
    ids = range(len(setup.index) - 1, -1, -1)  # a pass that resumes names its samples

    def run(device_id: int | None) -> list[Batch]:
        execute = execution(device_id)
        pipeline = saliency.saliency_pipeline(setup.index, image_config(tensor), execute, ids)
        return list(loader(setup, pipeline, saliency.OUTPUTS))

    return compare(run(None), run(setup.device_id))


@check(*product("user", ("roi", "full"), ("number", "name")))
def user_pipeline(setup: Setup, decode: str, naming: str) -> str:
    """A pipeline of somebody's own: the stage called once, on images whose size it asks for."""
    settings: dict[str, Any] = {"p_min": 1.0, "p_max": 1.0}
    return compare(
        *(
            list(users_own(setup, where, decode, naming, **settings))
            for where in (None, setup.device_id)
        )
    )


def users_own(
    setup: Setup, device_id: int | None, decode: str, naming: str, **settings: Any
) -> Loader:
    execute = execution(device_id)
    stage = scae_stage(setup, **settings)
    mixed = "cpu" if device_id is None else "mixed"

    @pipeline_def(enable_conditionals=stage.conditional, **execute.arguments())
    def define():
        jpegs, number = fn.readers.file(
            files=list(setup.index.files),
            file_root=setup.index.root,
            name="Reader",
            pad_last_batch=True,
        )
        ids: Any = number
        if naming == "name":
            ids = fn.get_property(jpegs, key="source_info")
        shapes = fn.peek_image_shape(jpegs)
        start, size = fn.random_crop_generator(shapes, seed=1)
        images: Any
        if decode == "roi":
            images = fn.decoders.image_slice(
                jpegs, start=start, shape=size, axis_names="HW", device=mixed
            )
        else:
            images = fn.slice(fn.decoders.image(jpegs, device=mixed), start, size, axis_names="HW")
        images = fn.resize(images, size=(224, 224))
        images, targets = stage(images, ids, window=(start, size, shapes))
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(seed=2),
            mean=list(IMAGENET_MEAN),
            std=list(IMAGENET_STD),
        )
        return images, *targets, number

    return loader(setup, define(), ("images", "label", "partner", "mu", "id"))


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
        step(f"{images} images; next are {batch.ids.tolist()}")
        assert batch.images.isfinite().all(), f"not finite: ids {batch.ids.tolist()}"
        images += len(batch.ids)
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


def image_config(tensor: str, decode: str = "full") -> ImageConfig:
    dtype, layout = TENSORS[tensor]
    return ImageConfig(dtype=dtype, layout=layout, decode=decode)  # type: ignore[arg-type]


def execution(device_id: int | None) -> ExecConfig:
    return ExecConfig(batch_size=BATCH, device_id=device_id, threads=2)


def scae_stage(setup: Setup, method: str = "scae", **settings) -> Stage:
    """Guided from the first batch on."""
    return Stage(
        setup.index,
        method,
        epochs=4,
        start_epoch=2,
        batch_size=BATCH,
        seed=SEED,
        cache=setup.cache,
        **settings,
    )


def train_loader(
    setup: Setup,
    device_id: int | None,
    method: str = "scae",
    decode: str = "full",
    tensor: str = "fp32-NCHW",
    checkpoint: bytes | None = None,
    **settings,
) -> Loader:
    stage = scae_stage(setup, method, **settings)
    image, execute = image_config(tensor, decode), execution(device_id)
    pipeline = train.train_pipeline(stage, image, execute, seed=SEED, checkpoint=checkpoint)
    return loader(setup, pipeline, train.OUTPUTS)


def loader(setup: Setup, pipeline: Pipeline, outputs: tuple[str, ...]) -> Loader:
    return Loader(pipeline, outputs, setup.index, drop_last=False)


def compare(reference: list[Batch], ours: list[Batch]) -> str:
    """AssertionError unless the batches agree; else how well."""
    assert len(ours) == len(reference), f"{len(ours)} batches for {len(reference)}"
    std = torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    grey = []
    for a, b in zip(reference, ours, strict=True):
        for field in (f.name for f in fields(Batch) if f.name != "images"):
            x, y = getattr(a, field).cpu(), getattr(b, field).cpu()
            assert torch.equal(x, y), f"{field} differ: {x.tolist()} and {y.tolist()}"
        assert a.images.dtype == b.images.dtype, f"{b.images.dtype} for {a.images.dtype}"
        assert a.images.stride() == b.images.stride(), "images of another memory layout"
        difference = (a.images.cpu().float() - b.images.cpu().float()).abs() * std
        grey += difference.mean((1, 2, 3)).tolist()
    where = int(np.argmax(grey))
    found = f"mean |difference| {np.mean(grey):.2f} grey levels, at most {grey[where]:.2f}"
    which = torch.cat([batch.ids for batch in reference])[where]
    assert max(grey) <= GREY_LEVELS, f"{found} in image {which}; allowed are {GREY_LEVELS}"
    return f"{len(grey)} images, {found}"


def step(what: str) -> None:
    """For the tail of stderr: how far a check came."""
    print(what, file=sys.stderr, flush=True)
