"""Measure how long the Python operator and each of its parts take for a batch, on one core.

    python tools/benchmark.py operator --json tools/results/operator_cpu.json

The row `operator` plans SCAE where λ is largest: it draws crop and flip, half of the images are
erased, and the maps of as many images as --samples says lie in memory. `ratio` is a row's rate over
that of this row. Its parts are `gather` (joins DALI's arrays), `plan`, of which `read` looks the
maps up, and `assemble` (makes DALI's outputs). Other rows look the maps up in LMDB, or plan methods
without maps.

--batches batches take turns, because the cost of a plan depends on what is drawn.

`graph, scae`: batches of a pipeline that has nothing but the operator and its inputs; `by torch`:
with backend="torch" of the stage. `graph, empty function`: the same with a function that does
nothing, which is DALI's own cost. Others show what each array costs that crosses the border between
DALI and Python: the three inputs without any function, one input instead, one output instead of
two, and DALI's operators that join the inputs or cast the output.

`images`: work on the pixels, uint8 HWC: nothing, a copy, and fn.erase in every other image, which
copies all of them.

`boxes, λ=…`: sizes and centres alone, for a batch in which all images are erased; `pixel sum`:
centres by the plain sum of eq. 4 of the paper over all pixels.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.methods.scae import Config as ScaeConfig
from scae_dali.plan import region
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.random import Stream, uniforms
from scae_dali.stage.operator import Operator
from scae_dali.stage.stage import Stage
from tools.common import bench
from tools.common.live import GUIDED
from tools.common.made_up import SEED, random_cache, smooth_maps
from tools.common.options import add_batch_size, count, positive

FULL_PX = (375, 500, 3)  # of ImageNet's most frequent image
LAMBDAS = (0.0, 2.0, 5.0, 20.0, -20.0)

Inputs = tuple[list[np.ndarray], ...]


def boxes(maps: np.ndarray, lam: float, size: int, exact: bool, epoch: int) -> np.ndarray:
    """Rectangles for a batch of crops of the middle of their images: int64 [B, 4]."""
    b = len(maps)
    ids, size_px = np.arange(b), np.full((b, 2), size)
    config = ScaeConfig()
    u = uniforms(0, Stream.ERASE, epoch, ids, 2 * config.tries).reshape(b, -1, 2)
    hw, _ = region.draw_size(u, size_px, config.area, config.aspect)
    first, last = region.centre_range(hw, size_px, "inside")

    u = uniforms(0, Stream.CENTRE, epoch, ids, region.DRAWS)
    if exact:
        u[:, 3:-1:4] = 2.0  # no proposal is accepted: the sum over pixels has to do it
    window = np.tile([[0.2, 0.1, 0.6, 0.7]], (b, 1))
    centre = region.draw_centre(
        u, maps, np.full(b, lam), window, size_px, first, last, lam_bound=abs(lam)
    )
    return region.box_at(centre, hw, size_px)


def given(ids: np.ndarray, step: int) -> Inputs:
    """DALI's inputs for the batch number `step`: lists of small arrays."""
    return (
        [np.array([i], np.int32) for i in ids],
        [np.array([step], np.int64) for _ in ids],
        [np.array(FULL_PX, np.int64) for _ in ids],
    )


def stage(index: ImageIndex, args: argparse.Namespace, method: str, **keywords: Any) -> Stage:
    return Stage(index, method, batch_size=args.batch_size, **keywords, **GUIDED)


def operator(of: Stage, args: argparse.Namespace) -> Operator:
    return of.operator(of.planner(CropConfig()), frames=1, size=(args.size, args.size))


def in_turn(function: Callable[..., object], arguments: Iterable[tuple]) -> Callable[[], object]:
    """A call of the function with each of these arguments in turn, over and over."""
    turns = itertools.cycle(list(arguments))
    return lambda: function(*next(turns))


def pieces(
    of: Operator, batches: list[Inputs], cache: SaliencyCache
) -> dict[str, Callable[[], object]]:
    """The parts of the operator, each as a call."""
    arrays = [of.arguments(inputs) for inputs in batches]
    tables = [of.planner(*part) for part in arrays]
    box = of.planner.columns["box"]
    erased = [part[0][table[:, box][:, 2] > 0] for part, table in zip(arrays, tables, strict=True)]
    return {
        "gather": in_turn(lambda *inputs: of.arguments(inputs), batches),
        "plan": in_turn(of.planner, arrays),
        "read": in_turn(cache.resident().read, [(ids,) for ids in erased]),
        "assemble": in_turn(assembled, [(table,) for table in tables]),
    }


def assembled(table: np.ndarray) -> tuple[list, list]:
    """A table as the operator hands it to DALI."""
    return list(table), list(table.astype(np.float32))


def graph(of: Stage, args: argparse.Namespace, ids: np.ndarray) -> Pipeline:
    """The operator in a pipeline, with inputs as those of a training pipeline. ids: int [n, B]."""

    def define() -> Any:
        return of.plan(
            fed(ids[:, :, None].astype(np.int32)),
            size=(args.size, args.size),
            shapes=fed(np.tile(np.array(FULL_PX, np.int64), (1, ids.shape[1], 1))),
            random_crop=CropConfig(),
        ).row

    return built(define, args)


def border_graphs(args: argparse.Namespace, wide: int) -> dict[str, Pipeline]:
    """Pipelines with the inputs of the operator and a function that does nothing. It gives rows of
    `wide` columns, as that of a stage does."""
    b = args.batch_size
    row, single = assembled(np.zeros((b, wide)))

    def both(*inputs: Any) -> Any:
        outputs = fn.python_function(
            *inputs, function=lambda *_: (row, single), num_outputs=2, batch_processing=True
        )
        return tuple(outputs)

    def one(*inputs: Any) -> Any:
        return fn.python_function(*inputs, function=lambda *_: row, batch_processing=True)

    def joined(ids: Any, number: Any, shapes: Any) -> Any:
        return fn.cat(fn.cast(ids, dtype=types.INT64), number, shapes, axis=0)

    def cast(output: Any) -> Any:
        return output, fn.cast(output, dtype=types.FLOAT)

    works: dict[str, Callable[[Any, Any, Any], Any]] = {
        "graph, inputs alone": lambda *inputs: inputs,
        "graph, empty function": both,
        "graph, empty function of one input": lambda ids, number, shapes: both(shapes),
        "graph, empty function of joined inputs": lambda *inputs: both(joined(*inputs)),
        "graph, empty function of one output": one,
        "graph, empty function of one output, cast": lambda *inputs: cast(one(*inputs)),
        "graph, empty function of one input and output": lambda ids, number, shapes: one(shapes),
    }

    def graph_of(work: Callable[[Any, Any, Any], Any]) -> Pipeline:
        def define() -> Any:
            ids = fed(np.zeros((1, b, 1), np.int32))
            return work(ids, *(fed(np.zeros((1, b, width), np.int64)) for width in (1, 3)))

        return built(define, args)

    return {name: graph_of(work) for name, work in works.items()}


def images_graph(args: argparse.Namespace, work: Callable[[Any, Any, Any], Any]) -> Pipeline:
    """A pipeline of work(images, anchor, shape) alone; anchor and shape are as in fn.erase."""
    b, side = args.batch_size, args.size
    images = np.random.default_rng(0).integers(0, 256, (1, b, side, side, 3), np.uint8)
    box = np.zeros((1, b, 4))
    box[:, ::2] = np.array([0.2, 0.3, 0.4, 0.5]) * side

    def define() -> Any:
        parts = fed(box)
        anchor, shape = (fn.cast(parts[at : at + 2], dtype=types.FLOAT) for at in (0, 2))
        return work(fed(images), anchor, shape)

    return built(define, args)


def fed(batches: np.ndarray) -> Any:
    """A node that gives one batch after the other, over and over. batches: [n, B, …]."""
    return fn.external_source(
        source=lambda info: batches[info.iteration % len(batches)],
        batch=True,
        batch_info=True,
        layout="HWC" if batches.ndim == 5 else None,
    )


def built(define: Callable[[], Any], args: argparse.Namespace) -> Pipeline:
    settings = {"batch_size": args.batch_size, "num_threads": 1, "device_id": None}
    pipeline = pipeline_def(define, prefetch_queue_depth=1, **settings)()
    pipeline.build()
    return pipeline


def rate(call: Callable[[], object], n: int, seconds: float) -> float:
    """Calls for about `seconds`, each with n samples; returns samples per second."""
    calls, start = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return calls * n / (time.perf_counter() - start)


def left_behind(call: Callable[[], object], calls: int = 100) -> float:
    """How many objects a call leaves in cycles, which only the garbage collector can free."""
    call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(calls):
            call()
        return gc.collect() / calls
    finally:
        gc.enable()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser_of(__doc__, __name__)
    add_batch_size(parser, 256, "images in a batch")
    parser.add_argument(
        "--batches",
        type=count,
        default=100,
        help="number of different batches that take turns; default: %(default)s",
    )
    parser.add_argument(
        "--samples",
        type=count,
        default=1_281_167,
        help="number of images of the data set; default: %(default)s, as in ImageNet",
    )
    parser.add_argument(
        "--size", type=count, default=224, help="side of the crop in pixels; default: %(default)s"
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=0.3,
        help="seconds for which a row is measured in a round; default: %(default)s",
    )
    return bench.parse(
        parser,
        argv,
        rounds=7,
        quick={"rounds": 3, "seconds": 0.05, "batches": 10, "samples": 20_000},
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    n, b = max(args.samples, args.batch_size), args.batch_size
    index = ImageIndex.from_arrays([f"{i}.jpg" for i in range(n)], np.zeros(n, np.int64))
    rng = np.random.default_rng(SEED)
    ids = np.stack([rng.permutation(n)[:b] for _ in range(args.batches)])
    batches = [given(batch, step) for step, batch in enumerate(ids)]
    maps = smooth_maps(b, (7, 7))
    with tempfile.TemporaryDirectory() as folder:
        cache = random_cache(os.path.join(folder, "maps.lmdb"), index)
        scae = stage(index, args, "scae", cache=cache)
        ours = operator(scae, args)
        looked_up = operator(stage(index, args, "scae", cache=cache, resident=False), args)
        by_torch = stage(index, args, "scae", cache=cache, backend="torch")
        calls: dict[str, Callable[[], object]] = {"operator": in_turn(ours.python, batches)}
        calls |= pieces(ours, batches, cache)
        calls["operator, maps looked up"] = in_turn(looked_up.python, batches)
        for method in ("none", "random_erasing"):
            other = operator(stage(index, args, method), args)
            calls[f"operator, {method}"] = in_turn(other.python, batches)
        width = ours.python(*batches[0])[0][0].size
        calls["graph, scae"] = graph(scae, args, ids).run
        calls["graph, scae by torch"] = graph(by_torch, args, ids).run
        calls |= {name: pipe.run for name, pipe in border_graphs(args, width).items()}
        steps = range(args.batches)
        pixels: dict[str, Callable[[Any, Any, Any], Any]] = {
            "images": lambda images, anchor, shape: (images, anchor, shape),
            "images, copied": lambda images, anchor, shape: (fn.copy(images), anchor, shape),
            "images, erased": lambda images, anchor, shape: fn.erase(
                images, anchor=anchor, shape=shape, axis_names="HW", fill_value=0
            ),
        }
        calls |= {name: images_graph(args, work).run for name, work in pixels.items()}
        calls["pixel sum"] = in_turn(boxes, [(maps, 2.0, args.size, True, step) for step in steps])
        for lam in LAMBDAS:
            drawn = [(maps, lam, args.size, False, step) for step in steps]
            calls[f"boxes, λ={lam:g}"] = in_turn(boxes, drawn)
        samples = bench.interleaved(
            {name: partial(rate, call, b, args.seconds) for name, call in calls.items()},
            args.rounds,
        )
        cycles = left_behind(calls["operator"])
    table = bench.rows(samples, "operator")
    extra = {
        "ms_per_batch": {row["name"]: round(1e3 * b / row["img_per_s"], 3) for row in table},
        "cyclic_garbage_per_batch": cycles,
        "settings": bench.settings(args),
    }
    bench.report(table, args, extra)
