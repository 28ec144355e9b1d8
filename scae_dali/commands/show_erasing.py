"""Draw a sheet of images with their saliency maps and with what the pipeline erases.

    scae-dali show-erasing --data imagenet --cache maps.lmdb --lam 0,2,5 --out sheet.png
    scae-dali show-erasing --data imagenet --cache maps.lmdb --method cmo --out sheet.png

Each image has a row: the upright image with the crop's window; its saliency over the full frame;
P of eq. 4 over the possible centres of the rectangle, for the λ of largest magnitude; and for each
λ the crop as the pipeline erases it, before the flip. All images are erased, whatever their class.

--method shows another method instead, which acts on all images: the row ends with the crop, before
the flip. A red line is drawn around the box that is erased, or that comes from a second image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def, types

from scae_dali.cache import CacheError, SaliencyCache
from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.commands.options import add_data, count, parser_of, picture_file
from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.methods import BUILT_IN, load, paste
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.region import centre_range, saliency_at
from scae_dali.stage import partner
from scae_dali.stage.images import decode, decode_crop, normalise, read
from scae_dali.stage.stage import Stage

SIDE_INCHES = 2.2  # of a panel
Array = NDArray[Any]


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, prog=prog)
    add_data(parser, required=True)
    parser.add_argument(
        "--cache", required=True, help="folder of the saliency cache of these images"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--images",
        type=int,
        default=4,
        help="how many images are shown, evenly spaced in the list of files; default: %(default)s",
    )
    which.add_argument(
        "--ids",
        default=None,
        metavar="3,5,8",
        help="which images are shown, by their place in the list of files, from 0",
    )
    parser.add_argument(
        "--method",
        default="scae",
        choices=[name for name in BUILT_IN if name not in ("none", "semantic_grid_mask")],
        metavar="NAME",
        help="method that is shown; default: %(default)s",
    )
    parser.add_argument(
        "--lam",
        default=None,
        metavar="λ,λ,...",
        help="values of λ of scae, joined by commas; default: 0,2,5",
    )
    parser.add_argument(
        "--epoch",
        type=int,
        default=1,
        help="epoch whose crops and rectangles are shown; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the crops and rectangles; default: %(default)s"
    )
    parser.add_argument(
        "--size", type=count, default=224, help="side of the crop in pixels; default: %(default)s"
    )
    parser.add_argument(
        "--out", type=picture_file, required=True, metavar="PNG", help="picture to write"
    )
    args = parser.parse_args(argv)
    try:
        args.lam = args.lam and [float(value) for value in args.lam.split(",")]
        args.ids = args.ids and [int(value) for value in args.ids.split(",")]
    except ValueError as error:
        parser.error(f"--lam and --ids are numbers with commas between, such as 0,2,5; {error}")
    if args.method == "scae":
        args.lam = args.lam or [0.0, 2.0, 5.0]
    elif args.lam:
        parser.error(f"--lam is for scae alone, got --method {args.method}: leave it out")
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    if args.epoch < 1:
        parser.error(f"--epoch must be at least 1, got {args.epoch}: λ is 0 in epoch 0")
    return args


def open_data(args: argparse.Namespace) -> tuple[ImageIndex, SaliencyCache, list[int]]:
    """The data set, its cache and the ids to show."""
    try:
        index = ImageIndex(args.data)
    except DatasetError as error:
        raise SystemExit(f"--data {args.data}: {error}") from error
    try:
        cache = SaliencyCache(args.cache, index=index)
    except CacheError as error:
        raise SystemExit(
            f"--cache {args.cache}: {error}\nTo build one: scae-dali build-cache "
            f"--data {index.root} --model resnet50 --weights FILE --out {args.cache}"
        ) from error
    last = len(index) - 1
    ids = args.ids or np.unique(np.linspace(0, last, args.images, dtype=int)).tolist()
    if wrong := [i for i in ids if not 0 <= i <= last]:
        raise SystemExit(f"--ids must be in 0..{last}, places in {index.root}; got {wrong[0]}")
    return index, cache, ids


def views(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each panel at the end of a row shows: its name -> settings of the method, by which it
    acts on all images."""
    if args.method == "scae":
        always = {"p_min": 1.0, "p_max": 1.0, "mix_prob": 0.0}
        return {f"λ={lam:g}": {"lam_max": lam, **always} for lam in args.lam}
    known = {f.name for f in fields(load(args.method).Config)}
    always = {"prob": 1.0, "skip_first": 0, "skip_last": 0, "saliency": True}
    return {args.method: {name: value for name, value in always.items() if name in known}}


def show_pipeline(stage: Stage, ids: list[int], side: int) -> Pipeline:
    """A training pipeline without shuffle and flip, which also gives the plan. side: of the crop,
    in pixels."""
    size, crop = (side, side), CropConfig()

    @pipeline_def(
        batch_size=len(ids), num_threads=2, device_id=None, enable_conditionals=stage.conditional
    )
    def define():
        encoded, numbers = read(stage.index, ids)
        upright = decode(encoded)
        shapes = fn.peek_image_shape(encoded)
        plan = stage.plan(numbers, size=size, shapes=shapes, random_crop=crop)
        start, shape = plan.part("start", types.FLOAT), plan.part("shape", types.FLOAT)
        images = decode_crop(encoded, start, shape, size)
        if stage.mixes:
            fetch = partial(partner.decode_crop, size=size, crop=crop, device="cpu")
            images = partner.mix(images, plan, crop, fetch)
        images = normalise(stage.apply(images, plan))
        window = (plan.part(name, types.INT32) for name in ("start", "shape"))
        box = plan.part("box", types.FLOAT)
        if "paste_shapes" in plan.planner.columns:
            pasted = (plan.part(name, types.FLOAT, slice(2, 4)) for name in paste.fields("paste"))
            box = fn.cat(*pasted)
        return upright, *window, box, images

    return define()


def run_once(pipeline: Pipeline) -> list[list[Array]]:
    """For each sample: upright image, start, shape, box (int64) and the erased crop (uint8)."""
    samples = []
    for sample in zip(*pipeline.run(), strict=True):
        upright, start, shape, box, crop = (np.array(value) for value in sample)
        grey = crop.transpose(1, 2, 0) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
        crop = grey.clip(0, 255).round().astype(np.uint8)
        samples.append([upright, start, shape, box.astype(np.int64), crop])
    return samples


def full_frame(saliency: Array, shape_px: tuple[int, int]) -> Array:
    """Â at every pixel: float [gh, gw] -> float [H, W]."""
    a = torch.from_numpy(saliency)[None, None]
    return torch.nn.functional.interpolate(
        a, size=shape_px, mode="bilinear", align_corners=False
    ).numpy()[0, 0]


def weights(
    saliency: Array, window: Any, full_px: Any, size_px: tuple[int, int], lam: float
) -> Array:
    """exp(λ·Â) of eq. 4 over the pixels of a crop, float64 [H, W].

    saliency: float [gh, gw] over the full frame. window: the crop (y, x, h, w), and full_px: (h, w)
    of the upright image, both in its pixels. size_px: (H, W) of the crop as the network sees it.
    """
    share = np.asarray(window) / np.tile(full_px, 2)
    axis_window = np.stack([share[:2], share[2:] / size_px], axis=1)[None]
    pixels = np.indices(size_px).reshape(2, -1).T[None]  # [1, H·W, 2]
    return np.exp(lam * saliency_at(saliency[None], pixels, axis_window)[0]).reshape(size_px)


def probability(
    saliency: Array, window: Array, shape_px: Array, box: Array, size: int, lam: float
) -> Array:
    """Eq. 4 summed pixel by pixel, over the centres for which a box of this size fits.

    window: (y, x, h, w) in px of the upright image. box: (y, x, h, w) in the crop. Returns float
    [S, S]; NaN where there can be no centre.
    """
    p = weights(saliency, window, shape_px, (size, size), lam)
    first, last = centre_range(box[None, 2:], np.array([[size, size]]), "inside")
    pixels = np.indices((size, size)).transpose(1, 2, 0)  # [S, S, 2]
    p[~((pixels >= first[0]) & (pixels <= last[0])).all(2)] = np.nan
    return p / np.nansum(p)


def outline(axes, box, **style) -> None:
    """Draw a box (y, x, h, w), in pixels, from pixel edge to pixel edge."""
    y, x, h, w = box
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, linewidth=1.5, **style))


def draw_row(
    axes, title: str, saliency: Array, found: bool, shown: dict[str, list[Array]], lam: float | None
) -> None:
    """Draw an image's row. saliency: float [gh, gw]. shown: name of a view -> what the pipeline
    gave for it. lam: the λ of largest magnitude; None: the method has none."""
    upright, start, shape, *_ = next(iter(shown.values()))
    window = np.concatenate([start, shape])
    axes[0].imshow(upright)
    axes[0].set_title(title)
    axes[1].imshow(upright.mean(2), cmap="gray")
    axes[1].imshow(full_frame(saliency, upright.shape[:2]), "jet", vmin=0, vmax=1, alpha=0.5)
    axes[1].set_title("saliency" if found else "no map")
    for panel in axes[:2]:
        outline(panel, window, color="white")
        outline(panel, window, color="black", linestyle=":")
    for name, (*_, box, crop), panel in zip(
        shown, shown.values(), axes[-len(shown) :], strict=True
    ):
        panel.imshow(crop)
        panel.set_title(name if lam is None else f"erased, {name}")
        outline(panel, box, color="red", linestyle=":")
        if lam is not None and name == f"λ={lam:g}":
            full_px = np.array(upright.shape[:2])
            p = probability(saliency, window, full_px, box, crop.shape[0], lam)
            axes[2].imshow(p, colormaps["viridis"].with_extremes(bad="0.85"), vmin=0)
            axes[2].plot(box[1] + box[3] // 2, box[0] + box[2] // 2, "r+")
            axes[2].set_title(f"P and the centre, {name}")
            outline(axes[2], box, color="red", linestyle=":")
    for panel in axes:
        panel.set_axis_off()
        panel.title.set_fontsize(8)


def describe(name: str, found: bool, shown: dict[str, list[Array]]) -> str:
    upright, start, shape, *_ = next(iter(shown.values()))
    window = (*start.tolist(), *shape.tolist())
    boxes = "".join(f" {view} {tuple(box.tolist())}" for view, (*_, box, _) in shown.items())
    size = f"{upright.shape[0]}x{upright.shape[1]}"
    return f"{name} {size} window {window}{'' if found else ' no map'} boxes{boxes}"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = parse(argv, prog)
    index, cache, ids = open_data(args)
    shown = {}
    for name, settings in views(args).items():
        # λ(t) = λ_max from epoch T = 1 on.
        stage = Stage(
            index,
            args.method,
            cache=cache,
            epochs=1,
            start_epoch=args.epoch,
            batch_size=len(ids),
            epoch_size=len(ids),  # the others are not read
            seed=args.seed,
            **settings,
        )
        shown[name] = run_once(show_pipeline(stage, ids, args.size))
    maps, found = cache.read(ids)
    lam = max(args.lam, key=abs) if args.lam else None
    columns = (2 if lam is None else 3) + len(shown)
    size_inches = (SIDE_INCHES * columns, SIDE_INCHES * len(ids))
    figure = Figure(figsize=size_inches, layout="constrained")
    grid = figure.subplots(len(ids), columns, squeeze=False)
    for row, (sample, axes) in enumerate(zip(ids, grid, strict=True)):
        here = {name: outputs[row] for name, outputs in shown.items()}
        title = f"{sample}: {index.classes[index.labels[sample]]}"[:28]
        draw_row(axes, title, maps[row].astype(np.float64) / 255, bool(found[row]), here, lam)
        print(describe(f"{sample} {index.files[sample]}", bool(found[row]), here))
    Path(args.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(f"wrote {args.out}")
