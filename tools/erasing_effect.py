"""Measure what erasing at several λ takes from a trained network, on its own training images.

    python tools/erasing_effect.py runs/scae --lam=-2,0,2,8 --json OUT

RUN is a finished run of train.py with a saliency cache. Its images are seen whole, as in the
saliency pass, and all are erased. An image's rectangle has the same size at all λ, so that rows
differ only in its position. Columns: mean Â under the rectangle over mean Â of the image; top-1;
the mean probability of the image's class, and how far it falls below that without erasing. λ = 0
ignores saliency; its rectangles fit into the image and so cover the middle more often. If guidance
works, saliency and fall rise with λ. If they stay as they are at λ = 0, the maps, or λ, do nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.config import ExecConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from pipelines.recipe import Config
from scae_dali.cache import SaliencyCache
from scae_dali.commands.program import run_program
from scae_dali.data.index import ImageIndex
from scae_dali.methods.keep_augment import importance
from scae_dali.stage.loader import ids_of
from scae_dali.stage.stage import Stage
from scae_dali.training.networks import make_network
from scae_dali.training.precision import autocast
from scae_dali.training.weights import load_weights
from tools.common.about import about, write_json
from tools.common.options import add_data, output_file, parser_of
from tools.paper.jobs import resolve

WHOLE = np.array([[0.0, 0.0, 1.0, 1.0]])  # the window of an image that is seen whole


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    add_data(parser, type=str, help="folder of the data set; default: the --data.root of the run")
    parser.add_argument(
        "--lam",
        default="-2,0,1,2,4,8",
        metavar="λ,λ,...",
        help="values of λ, joined by commas; default: %(default)s",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=5000,
        help="how many training images are taken at most, evenly spaced; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the rectangles; default: %(default)s"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="OUT", help="write the figures to OUT as JSON"
    )
    args = parser.parse_args(argv)
    try:
        args.lam = [float(value) for value in args.lam.split(",")]
    except ValueError as error:
        parser.error(f"--lam are numbers with commas between, such as --lam=-2,0,2; {error}")
    if args.images < 2:
        parser.error(f"--images must be at least 2, for an error, got {args.images}")
    return args


def open_run(args: argparse.Namespace) -> tuple[Config, torch.nn.Module, Data, SaliencyCache]:
    """The run's settings, network, images and maps. Raises ValueError or OSError."""
    settings = args.run / "config.json"
    if not settings.is_file() or not (args.run / "weights.pt").is_file():
        raise ValueError(f"{str(args.run)!r} must be the folder of a finished run of train.py")
    moved = [f"--data.root={args.data}"] if args.data else []
    config = resolve(args.run.name, [f"--config={settings}", *moved])
    data = config.data.open(config.threads)
    cache = SaliencyCache(config.saliency.cache or args.run / "saliency.lmdb", index=data.train)
    net = make_network(config.model, data.train.num_classes, config.image.size)
    load_weights(net, str(args.run / "weights.pt"))
    return config, net.eval(), data, cache


def planner(index: ImageIndex, cache: SaliencyCache, config: Config, lam: float, seed: int):
    """Ids int64 [B] -> boxes int64 [B, 4], (y, x, h, w), for whole images."""
    scae = vars(config)["scae"]  # a field that pipelines.recipe makes
    fitted = {name: getattr(scae, name) for name in ("area", "aspect", "tries", "border")}
    # λ(t) = λ_max from epoch T = 1 on.
    stage = Stage(
        index, "scae", cache=cache, epochs=1, start_epoch=1, batch_size=len(index), seed=seed,
        lam_max=lam, p_min=1.0, p_max=1.0, mix_prob=0.0, **fitted,
    )  # fmt: skip
    plan = stage.planner()
    size = config.saliency_image().size

    def boxes(ids: np.ndarray) -> np.ndarray:
        table = plan(ids, np.zeros_like(ids), np.full((len(ids), 2), size, dtype=np.int64))
        return table[:, plan.columns["box"]].astype(np.int64)

    return boxes


def erased(images: Tensor, boxes: np.ndarray) -> Tensor:
    """float [B, 3, H, W], normalised, with the boxes filled with the mean."""
    out = images.clone()
    for image, (y, x, h, w) in zip(out, boxes.tolist(), strict=True):
        image[:, y : y + h, x : x + w] = 0
    return out


def contrast(maps: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Mean Â under each box over mean Â of the image: float64 [B]; NaN for an empty box or a map
    of zeros.

    maps: uint8 [B, gh, gw].
    """
    b = len(boxes)
    saliency, window = maps / 255, np.repeat(WHOLE, b, axis=0)
    frame = np.full((b, 2), size)
    under = importance(saliency, boxes[:, None, :2], boxes[:, 2:].clip(1), window, frame)
    mean = importance(saliency, np.zeros((b, 1, 2), np.int64), frame, window, frame)
    known = (mean[:, 0] > 0) & (boxes[:, 2] > 0)
    return np.where(known, under[:, 0] / np.where(known, mean[:, 0], 1), np.nan)


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the images as they are, and one for each λ."""
    config, net, data, cache = open_run(args)
    index, image = data.train, config.saliency_image()
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    net.to(device)
    ids = np.unique(np.linspace(0, len(index) - 1, min(args.images, len(index)), dtype=np.int64))
    run = ExecConfig(batch_size=config.batch_size, device_id=device.index, threads=config.threads)
    loaders = Loaders(data, image, sampling="shuffle", seed=args.seed)
    place = {lam: planner(index, cache, config, lam, args.seed) for lam in args.lam}
    sums: dict[Any, list[np.ndarray]] = {key: [] for key in (None, *place)}

    def score(images: Tensor, labels: Tensor) -> np.ndarray:
        with autocast(config.amp, device):
            p = net(images).float().softmax(1)
        right = (p.argmax(1) == labels).double()
        own = p.gather(1, labels[:, None])[:, 0].double()
        return torch.stack([right, own]).cpu().numpy()

    for batch in loaders.saliency(image, run, ids.tolist()):
        maps, found = cache.read(ids_of(batch).numpy())
        usable = found & (maps.max((1, 2)) > maps.min((1, 2)))
        whole = score(batch.images, batch.labels)
        sums[None].append(np.vstack([whole, np.full(len(maps), np.nan)]))
        for lam, boxes_of in place.items():
            boxes = boxes_of(ids_of(batch).numpy())
            ratio = np.where(usable, contrast(maps, boxes, image.size), np.nan)
            figures = score(erased(batch.images, boxes), batch.labels)
            sums[lam].append(np.vstack([figures, ratio]))
    return list(rows(sums))


def rows(sums: dict[Any, list[np.ndarray]]) -> Iterator[dict[str, Any]]:
    """The rows of the table. sums: λ -> float64 [3, B] a batch: right, probability, contrast."""
    whole = np.concatenate(sums[None], axis=1)
    for lam, parts in sums.items():
        right, own, ratio = np.concatenate(parts, axis=1)
        fall = whole[1] - own
        yield {
            "lam": lam,
            "images": len(own),
            "saliency": None if np.isnan(ratio).all() else float(np.nanmean(ratio)),
            "top1": 100 * float(right.mean()),
            "probability": float(own.mean()),
            "fall": float(fall.mean()),
            "fall_error": float(fall.std(ddof=1) / len(fall) ** 0.5),
        }


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        table = measure(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{'erased':>10}{'saliency':>10}{'top-1':>8}{'p(class)':>10}{'fall':>8}{'± error':>9}")
    for row in table:
        name = "nothing" if row["lam"] is None else f"λ = {row['lam']:g}"
        ratio = "" if row["saliency"] is None else f"{row['saliency']:.2f}"
        figures = f"{row['top1']:8.2f}{row['probability']:10.3f}{row['fall']:8.3f}"
        print(f"{name:>10}{ratio:>10}{figures}{row['fall_error']:9.3f}")
    if args.json is not None:
        settings = json.loads((args.run / "config.json").read_text())
        trained = {"model": settings["model"], "epochs": settings["epochs"]}
        write_json(args.json, {**about(), **trained, "seed": args.seed, "rows": table})


if __name__ == "__main__":
    sys.exit(run_program(main))
