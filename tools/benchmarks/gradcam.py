"""Compare the time of Grad-CAM with a forward pass. The goal is at most 1.10 times as long.

    python tools/benchmark.py gradcam --model resnet50 --json tools/results/gradcam_cpu.json

Rows: `forward` (the plain model, evaluation mode, no graph), `gradcam` (ours) and, if it is
installed and supports the precision, `grad-cam (PyPI)`: all with the same images, weights,
precision and memory format. `ratio` is a row's rate over that of `forward`, `cost` its inverse for
ours. `--scorecam` adds a row with as many forward passes as the layer has channels: choose small
--batch-size and --rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from importlib import metadata

import torch

from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.scorecam import ScoreCAM
from scae_dali.training.networks import make_network
from scae_dali.training.precision import autocast
from tools.common import bench
from tools.common.options import add_batch_size, add_device, add_precision, count


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser_of(__doc__, __name__)
    parser.add_argument(
        "--model",
        default="resnet50",
        help="name of the network, as --model of train.py takes it; default: %(default)s",
    )
    parser.add_argument(
        "--layer",
        default=None,
        help="name of the layer that the maps are made from; default: the usual one of the network",
    )
    add_batch_size(parser, 16, "images in a batch")
    parser.add_argument(
        "--size", type=count, default=224, help="side of the images in pixels; default: %(default)s"
    )
    add_device(parser)
    add_precision(parser)
    parser.add_argument("--scorecam", action="store_true", help="measure Score-CAM too")
    return bench.parse(parser, argv, rounds=7, quick={"rounds": 3, "batch_size": 4})


def rate(
    step: Callable[[], object], args: argparse.Namespace, device: torch.device
) -> Callable[[], float]:
    """A function that runs `step` and returns img/s. On a GPU it runs it often enough that the work
    queued there is measured, and not the host."""
    cuda = device.type == "cuda"
    times = 20 if cuda else 1

    def measure() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with autocast(args.amp, device):
            for _ in range(times):
                step()
        if cuda:
            torch.cuda.synchronize()
        return times * args.batch_size / (time.perf_counter() - start)

    return measure


def candidates(args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    device = torch.device("cpu" if args.device_id is None else f"cuda:{args.device_id}")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as train.py does
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = make_network(args.model, 1000, args.size).eval()
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    images = images.to(device, memory_format=layout)
    labels = torch.arange(args.batch_size, device=device)
    ours = GradCAM(model, args.layer)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    steps: dict[str, Callable[[], object]] = {
        "forward": forward,
        "gradcam": lambda: ours(images, labels),
    }
    if args.scorecam:
        masking = ScoreCAM(model, args.layer)
        steps["scorecam"] = lambda: masking(images, labels)
    # The package turns features into NumPy arrays, which have no bfloat16.
    if importlib.util.find_spec("pytorch_grad_cam") and args.amp != "bf16":
        from pytorch_grad_cam import GradCAM as ReferenceCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        targets = [ClassifierOutputTarget(i) for i in range(args.batch_size)]

        def reference() -> None:
            # Its hooks live as long as the object: they must not run in the other rows.
            with ReferenceCAM(model, [model.get_submodule(ours.layer)]) as cam:
                cam(images, targets)
            model.zero_grad()

        steps["grad-cam (PyPI)"] = reference
    return {name: rate(step, args, device) for name, step in steps.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    table = bench.rows(bench.interleaved(candidates(args), args.rounds), baseline="forward")
    costs = {row["name"]: 1 / row["ratio"] for row in table}
    extra: dict[str, object] = {"cost": round(costs["gradcam"], 3), "goal": "cost <= 1.10"}
    extra["settings"] = bench.settings(args)
    if "scorecam" in costs:
        extra["scorecam cost"] = round(costs["scorecam"])
    if "grad-cam (PyPI)" in costs:
        extra["grad-cam"] = metadata.version("grad-cam")
    bench.report(table, args, extra)
