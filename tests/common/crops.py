"""Images through pipelines: what comes out of training, what an augmentation makes of pixels."""

from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image

from pipelines import files, memory
from pipelines.config import ExecConfig
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.plan.order import Order
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage


def train_batches(kind, index, pixels, image, *, name="scae", epochs=2, **settings):
    """id -> (image, everything else), of every epoch."""
    stage = Stage(index, name, epochs=3, batch_size=16, seed=4, **settings)
    run = ExecConfig(batch_size=16, threads=1)
    order = None if kind == "files" else Order(index.labels, batch_size=16, seed=4)
    if kind == "memory":
        pipeline = memory.train_pipeline(stage, ArrayImages(index, pixels), order, image, run)
    else:
        pipeline = files.train_pipeline(stage, image, run, seed=4, order=order)
    loader = Loader(pipeline, files.OUTPUTS, index, drop_last=False, order=order)
    out = []
    for _ in range(epochs):
        seen = {}
        for b in loader:
            last = b.images.is_contiguous(memory_format=torch.channels_last)
            assert last == (image.layout == "NHWC")
            rest = zip(b.labels, b.partners, b.mu, b.status, b.boxes, strict=True)
            rows = zip(b.ids.tolist(), b.images.numpy(), rest, strict=True)
            seen |= {i: (one, [v.tolist() for v in values]) for i, one, values in rows}
        out.append(seen)
    assert stage.seconds > 0
    return out


H, W, N = 40, 56, 60


def smooth():
    """Smooth and not square: uint8 [N, H, W, 3], of many ranges of grey."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (N, 5, 7, 3)) * rng.uniform(0.3, 1, (N, 1, 1, 1))
    coarse = torch.from_numpy(coarse).permute(0, 3, 1, 2)
    fine = torch.nn.functional.interpolate(coarse, size=(H, W), mode="bicubic")
    return fine.clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def stage_of(name, batch_size, **settings):
    index = ImageIndex.from_arrays([f"{k}.jpg" for k in range(N)], np.arange(N) % 3)
    return Stage(index, name, epochs=1, batch_size=batch_size, seed=5, **settings)


def transformed(name, pixels, batch_size=N, conditionals=True, size=None, **settings):
    """By the stage in a pipeline: uint8 [N, H, W, 3], and the plan's rows as dict of columns."""
    one = stage_of(name, batch_size, **settings)
    ids = np.resize(np.arange(N), (one.batches_per_epoch, batch_size))

    @pipeline_def(
        batch_size=batch_size, num_threads=1, device_id=None, enable_conditionals=conditionals
    )
    def define():
        images = fn.external_source(source=[pixels[i] for i in ids], layout="HWC", cycle=True)
        keys = fn.external_source(source=list(ids[:, :, None]), cycle=True)
        return one(images, keys, size=size)[0]

    pipeline = define()
    out = np.concatenate([pipeline.run()[0].as_array() for _ in ids])[:N]
    planner = one.planner()
    rows = planner(np.arange(N), np.zeros(N, int), np.tile([[H, W]], (N, 1)))
    return out, {key: rows[:, columns] for key, columns in planner.columns.items()}


def shifted(pixels, window):
    """A window of an image's own size, black outside it."""
    pad = 8
    y, x, h, w = window
    whole = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
    return whole[y + pad : y + pad + h, x + pad : x + pad + w]


def write_pngs(root: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Random PNGs of (h, w); returns their pixels."""
    rng = np.random.default_rng(1)
    pixels = {}
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels[name] = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels[name]).save(root / name)
    return pixels
