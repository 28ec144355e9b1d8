"""Samples and methods for plans without DALI, and slow references for them."""

import numpy as np
import torch

from scae_dali.methods import Run, Samples, grid, load, make_config


def samples(n, labels=None, epoch=5, size=(64, 64), window=(0.0, 0.0, 1.0, 1.0)):
    return Samples(
        ids=np.arange(n),
        keys=np.arange(n),
        labels=np.zeros(n, np.int64) if labels is None else labels,
        epoch=np.full(n, epoch),
        window=np.tile(np.array(window), (n, 1)),
        size_px=np.tile(np.array(size), (n, 1)),
        iteration=np.full(n, 7),
        place=np.arange(n),
        flip=np.zeros(n, bool),
    )


def corner_maps(ids):
    """All saliency at the top left."""
    maps = np.zeros((len(ids), 7, 7), np.uint8)
    maps[:, :2, :2] = 255
    return maps, np.ones(len(ids), bool)


def method(name, saliency=None, counts=(100,), epochs=10, **settings):
    module = load(name)
    run = Run(
        seed=3,
        epochs=epochs,
        labels=np.arange(30_000) % len(counts),
        class_counts=np.array(counts),
        saliency=saliency,
    )
    return module.Method(make_config(module, settings), run)


def check_pure(one, batch, parts):
    """A part's plan is that of the whole batch. Returns the whole's."""
    whole = one.plan(batch)
    for part in parts:
        for key, value in one.plan(batch.take(part)).items():
            np.testing.assert_array_equal(value, whole[key][part])
    return whole


def saliency_map(seed=0, grid=(7, 7)):
    rng = np.random.default_rng(seed)
    values = rng.random(grid) ** 2
    return (values - values.min()) / (values.max() - values.min())


def brute_saliency(saliency, window, h, w):
    """Â at every pixel of the crop, by torch's own bilinear sampling with zeros outside."""
    y = window[0] + (np.arange(h) + 0.5) / h * window[2]
    x = window[1] + (np.arange(w) + 0.5) / w * window[3]
    grid = np.stack(np.meshgrid(x * 2 - 1, y * 2 - 1, indexing="xy"), axis=-1)
    out = torch.nn.functional.grid_sample(
        torch.from_numpy(saliency)[None, None],
        torch.from_numpy(grid)[None],
        align_corners=False,
        padding_mode="border",
    )[0, 0].numpy()
    inside = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))[None, :]
    return np.where(inside, out, 0.0)


def drawn(plan):
    """(d, kept, y, x, degrees) of each sample, int64 [B, 5]: y, x is where a square begins in the
    upright grid, which is then turned about the image's centre."""
    d, share, angle, shift_y, shift_x, height, width = plan["grid"].T
    sin, cos = np.sin(angle), np.cos(angle)
    y, x = (height - 1) / 2, (width - 1) / 2  # the centre, in pixels
    begin = [height / 2 - x * sin - y * cos + shift_y, width / 2 - x * cos + y * sin + shift_x]
    degrees = np.degrees(angle)
    numbers = np.stack([d, d - share * d, *np.mod(np.round(begin, 6), d), degrees], axis=1)
    whole = np.round(numbers).astype(int)
    np.testing.assert_allclose(numbers, whole, atol=1e-5)
    return whole


def masks(plan, size):
    """What the plan erases, int64 [B, H, W]: how many rectangles lie over each pixel."""
    out = np.zeros((len(plan["grid"]), *size), int)
    for i, (y, x, h, w) in zip(*grid.rectangles(plan["grid"]), strict=True):
        assert h > 0
        assert w > 0
        assert y >= 0
        assert x >= 0
        assert y + h <= size[0]
        assert x + w <= size[1]
        out[i, y : y + h, x : x + w] += 1
    return out
