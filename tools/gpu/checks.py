"""What the GPU checks share: their registry, what they work on, and how batches are compared.

A check gets a Setup and the parts of its name, returns what it found, and raises if that is wrong.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def

from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from scae_dali.cache import SaliencyCache
from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.data.index import ImageIndex
from scae_dali.stage.loader import Batch, Loader, ids_of
from scae_dali.stage.stage import Stage
from tools.common.live import acting

SEED = 7
BATCH = 8
GREY_LEVELS = 3.0  # mean absolute difference that is allowed in an image, of 255
TENSORS = {"fp32-NCHW": ("fp32", "NCHW"), "fp16-NHWC": ("fp16", "NHWC")}


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
    """A context in which whatever waits for the GPU raises."""
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


def image_config(tensor: str, decode: str = "full") -> ImageConfig:
    dtype, layout = TENSORS[tensor]
    return ImageConfig(dtype=dtype, layout=layout, decode=decode)  # type: ignore[arg-type]


def execution(device_id: int | None) -> ExecConfig:
    return ExecConfig(batch_size=BATCH, device_id=device_id, threads=2)


def scae_stage(setup: Setup, method: str = "scae", **settings) -> Stage:
    """A stage that is guided from the first batch on."""
    return Stage(
        setup.index,
        method,
        epochs=4,
        start_epoch=2,
        batch_size=BATCH,
        seed=SEED,
        cache=setup.cache,
        **acting(method),
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
    pipeline = files.train_pipeline(stage, image, execute, seed=SEED, checkpoint=checkpoint)
    return loader(setup, pipeline, files.OUTPUTS)


def loaders(setup: Setup, tensor: str) -> Loaders:
    image = image_config(tensor)
    return Loaders(Data(setup.index, setup.index), image, sampling="shuffle", seed=SEED)


def loader(setup: Setup, pipeline: Pipeline, outputs: tuple[str, ...]) -> Loader:
    return Loader(pipeline, outputs, setup.index, drop_last=False)


def compare(reference: list[Batch], ours: list[Batch]) -> str:
    """Raise AssertionError unless the batches agree; returns how well they do."""
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
    which = torch.cat([ids_of(batch) for batch in reference])[where]
    assert max(grey) <= GREY_LEVELS, f"{found} in image {which}; allowed are {GREY_LEVELS}"
    return f"{len(grey)} images, {found}"


def step(what: str) -> None:
    """Print to stderr how far a check came."""
    print(what, file=sys.stderr, flush=True)
