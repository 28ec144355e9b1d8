"""How long it takes to decide: boxes per second on one core, without any pixels.

    python tools/bench_plan.py --json tools/results/plan_cpu.json

Rows: `pixel sum`, centres by the plain sum of eq. 4 over all pixels, which `ratio` is to;
`boxes, λ=…`, sizes and centres of a batch that is erased throughout; `plan`, all that SCAE's Python
operator decides for a batch, crop and flip included; `plan (torch)`, the same by torch on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import _bench
from scae_dali import region
from scae_dali.config import CropConfig, ScaeConfig
from scae_dali.dataset import ImageIndex
from scae_dali.methods import Run, scae
from scae_dali.planner import Planner
from scae_dali.rng import Stream, uniforms

GRID = 7
LAMBDAS = (0.0, 2.0, 5.0, 20.0, -20.0)


def smooth_maps(n: int) -> np.ndarray:
    """A bump somewhere, about as wide as Grad-CAM's are: float64 [n, 7, 7] in [0, 1]."""
    rng = np.random.default_rng(0)
    cells = np.arange(GRID) / (GRID - 1)
    y, x = rng.random((2, n, 1, 1))
    maps = np.exp(
        -((cells[:, None] - y) ** 2 + (cells - x) ** 2) / rng.uniform(0.1, 0.5, (n, 1, 1)) ** 2
    )
    maps -= maps.min((1, 2), keepdims=True)
    return maps / maps.max((1, 2), keepdims=True)


def boxes(maps: np.ndarray, lam: float, size: int, exact: bool) -> np.ndarray:
    """Rectangles for a batch of crops of the middle of their images: int64 [B, 4]."""
    b = len(maps)
    ids, size_px = np.arange(b), np.full((b, 2), size)
    config = ScaeConfig()
    u = uniforms(0, Stream.ERASE, 0, ids, 2 * config.tries).reshape(b, -1, 2)
    hw, _ = region.draw_size(u, size_px, config.area, config.aspect)
    first, last = region.centre_range(hw, size_px, "inside")

    def draw(rows: np.ndarray | slice, n: int) -> np.ndarray:
        u = uniforms(0, Stream.CENTRE, 0, ids[rows], n)
        if exact:
            u[:, 3::4] = 2.0  # no proposal is accepted: the sum over pixels has to do it
        return u

    window = np.tile([[0.2, 0.1, 0.6, 0.7]], (b, 1))
    centre = region.draw_centre(
        draw, maps, np.full(b, lam), window, size_px, first, last, lam_bound=abs(lam)
    )
    return region.box_at(centre, hw, size_px)


def plans(n: int, size: int, backend: str) -> Callable[[], object]:
    """A call that plans a batch of n samples at λ = 2."""
    index = ImageIndex.from_arrays([f"{i}.jpg" for i in range(n)], [0] * n)
    asarray = np.asarray if backend == "numpy" else torch.from_numpy
    maps = asarray(np.round(255 * smooth_maps(n)).astype(np.uint8))
    found = asarray(np.ones(n, bool))
    run = Run(
        seed=0,
        epochs=1,
        labels=index.labels,
        class_counts=index.class_counts,
        saliency=lambda i: (maps[i], found[i]),
    )
    planner = Planner(
        index,
        scae.Method(ScaeConfig(), run),
        run,
        batch_size=n,
        batches_per_epoch=1,
        start_epoch=1,
        random_crop=CropConfig(),
    )
    arrays = (np.arange(n), np.zeros(n, np.int64), np.full((n, 2), size), np.full((n, 2), 400.0))
    return partial(planner, *(asarray(a) for a in arrays))


def rate(call: Callable[[], object], n: int, seconds: float) -> float:
    """-> samples per second: the median call of about `seconds`."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return n / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a row in a round")
    args = _bench.parse(parser, None, rounds=7, quick={"rounds": 3, "seconds": 0.05})
    for name in ("batch_size", "size", "rounds"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    torch.set_num_threads(1)
    maps = smooth_maps(args.batch_size)
    calls: dict[str, Callable[[], object]] = {
        "pixel sum": partial(boxes, maps, 2.0, args.size, True)
    }
    for lam in LAMBDAS:
        calls[f"boxes, λ={lam:g}"] = partial(boxes, maps, lam, args.size, False)
    calls["plan"] = plans(args.batch_size, args.size, "numpy")
    calls["plan (torch)"] = plans(args.batch_size, args.size, "torch")
    samples = _bench.interleaved(
        {name: partial(rate, call, args.batch_size, args.seconds) for name, call in calls.items()},
        args.rounds,
    )
    table = _bench.rows(samples, "pixel sum")
    milliseconds = {
        row["name"]: round(1e3 * args.batch_size / row["img_per_s"], 3) for row in table
    }
    _bench.report(table, args, {"ms_per_batch": milliseconds, "batch_size": args.batch_size})


if __name__ == "__main__":
    main()
