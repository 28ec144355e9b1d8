"""Throughput of the training pipeline by method, beside no erasing and beside what others do.

    python tools/bench_pipeline.py --data imagenet/train --json tools/results/pipeline_cpu.json
    python tools/bench_pipeline.py --data imagenet/train --methods none,scae --peers native \
        --threads 1,2 --batch-size 64,256 --dtype fp32,fp16 --decode roi,full --json sweep.json

Rows: a method each, or several joined by +; `none (again)`, a second pipeline like `none`, which
shows the noise floor; and those of --peers:
native       `native METHOD`, DALI's own counterpart of a method, with DALI's random numbers, on the
             crops of `none`; `native none`, DALI's own crop and flip without any Python: what the
             plan of `none` costs; `decode alone`, files read and decoded whole, and no more: the
             rate that the decoder sets (a `roi` decoder may leave parts out, and exceed it);
             `undecoded METHOD`, of none and SCAE, files read and crops planned, and no more: what
             is left to the CPU where a GPU decodes. The slower of the two sets the pace there.
torchvision  `torchvision METHOD`, the same recipe with torchvision's in a DataLoader with as many
             workers as DALI has threads, decoded with Pillow as ImageFolder does; `torchvision
             (decode_image)`, that of Random Erasing with torchvision's own decoder.
timm         `timm METHOD`, likewise by timm's create_loader; on the CPU without its prefetcher.
`ratio` is a row's rate over that of `none`; `versus_native`, `versus_torchvision` and `versus_timm`
are those over the counterparts, which for SCAE are those of Random Erasing.
`cpu_ms_per_image` counts the work instead of the time: it bears other load on the machine.

All rows live at once and take turns. Methods run with their default settings; SCAE where λ is
largest, from a cache of random maps, and where nothing of a tail is mixed: the classes have one
size (bench_mixing.py has a tail). --threads, --batch-size, --prefetch, --dtype, --decode,
--layout and --hw-decoder-load take several values, A,B,...: every combination is measured, one
after the other, with ratios to its own `none`, and names of rows say what differs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import _native
import _peers
import torch
from _live import (
    GUIDED,
    SEED,
    Row,
    endless,
    epoch_index,
    evened,
    medians,
    random_cache,
    settle,
)
from _options import count, existing_folder, shares, some_of, usable_device, whole_numbers

import _bench
import _path  # noqa: F401
from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.methods import BUILT_IN
from scae_dali.stage.images import resolve_decode
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage

PEERS = ("native", "torchvision", "timm")
# The options of which every combination is measured, and how names of rows tell their values.
SWEPT = {
    "threads": "threads {}",
    "batch_size": "batch {}",
    "dtype": "{}",
    "decode": "{}",
    "layout": "{}",
    "prefetch": "prefetch {}",
    "hw_decoder_load": "JPEG engine {:.0%}",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR", help="DIR/<class>/<image>"
    )
    parser.add_argument("--methods", default=",".join(BUILT_IN), metavar="A,B,...")
    parser.add_argument(
        "--backends",
        type=some_of("python", "torch", "numpy"),
        default="python",
        metavar="A,B",
        help="of SCAE's plan: python (or numpy, its other name), torch or both",
    )
    parser.add_argument(
        "--peers",
        type=some_of(*PEERS, "none"),
        default=",".join(PEERS),
        metavar="A,B,...",
        help="rows of others, or none; default: all",
    )
    parser.add_argument("--batches", type=count, help="a round; default: an epoch's")
    parser.add_argument("--repeat", type=count, default=1, help="times each file is in an epoch")
    parser.add_argument("--size", type=count, default=224, help="side of the crop in pixels")
    parser.add_argument("--device-id", type=usable_device, default="cpu", metavar="N|cpu")
    several = partial(parser.add_argument, metavar="A,B,...")
    several("--threads", type=whole_numbers, default="2", help="default: 2")
    several("--batch-size", type=whole_numbers, default="64", help="default: 64")
    ahead, load = str(ExecConfig.prefetch), str(ExecConfig.hw_decoder_load)
    several("--prefetch", type=whole_numbers, default=ahead, help=f"batches; default: {ahead}")
    several("--hw-decoder-load", type=shares, default=load, help=f"default: {load}")
    several("--dtype", type=some_of("fp32", "fp16"), default="fp32", help="fp32, fp16")
    several("--layout", type=some_of("NCHW", "NHWC"), default="NCHW", help="NCHW, NHWC")
    several("--decode", type=some_of("auto", "roi", "full"), default="auto", help="auto, roi, full")
    args = _bench.parse(
        parser,
        argv,
        rounds=5,
        quick={"rounds": 3, "batches": 3, "peers": "native"},
    )
    args.methods = args.methods.split(",")
    args.peers = [peer for peer in args.peers if peer != "none"]
    if "none" not in args.methods:
        parser.error("--methods must name none, the row that the ratios are to")
    if unknown := {part for name in args.methods for part in name.split("+")} - set(BUILT_IN):
        parser.error(f"--methods: no method {', '.join(unknown)}; there are {', '.join(BUILT_IN)}")
    if "timm" in args.peers and not _peers.has_timm():
        print("timm is not installed, so its rows are left out; pip install timm")
        args.peers.remove("timm")
    return args


def live_rows(
    args: argparse.Namespace,
    index: ImageIndex,
    cache: SaliencyCache,
    image: ImageConfig,
    run: ExecConfig,
) -> dict[str, Row]:
    """Every row's pipeline or DataLoader, running."""
    device = "cpu" if run.device_id is None else f"cuda:{run.device_id}"
    ahead = run.prefetch + 1

    def planned_by(method: str, **keywords) -> Stage:
        return Stage(index, method, batch_size=run.batch_size, cache=cache, **GUIDED, **keywords)

    def row(build: Callable, method: str, **keywords) -> Row:
        stage = planned_by(method, **keywords)
        loader = Loader(build(stage, image, run), files.OUTPUTS, index, drop_last=False)
        return Row((batch.images for batch in endless(loader)), ahead, stage)

    def workers(batches: Callable, method: str, **keywords) -> Row:
        keywords |= {"batch_size": run.batch_size, "workers": run.threads, "device": device}
        return Row(
            batches(index, image, method=method, **keywords), run.threads * (_peers.AHEAD + 1)
        )

    ours = partial(files.train_pipeline, seed=SEED)
    out = {}
    for method in args.methods:
        if method != "scae" or {"python", "numpy"} & {*args.backends}:
            out[method] = row(ours, method)
        if method == "scae" and "torch" in args.backends:
            out["scae (torch)"] = row(ours, method, backend="torch")
    out["none (again)"] = row(ours, "none")
    if "native" in args.peers:
        out["native none"] = Row(_native.plain(index, image, run), ahead)
        for method in args.methods:
            if augment := _native.COUNTERPARTS.get(method):
                build = partial(_native.augmented_pipeline, augment=augment)
                out[f"native {method}"] = row(build, "none")
        out["decode alone"] = Row(_native.decoded(index, run), ahead)
        for method in args.methods:
            if method in ("none", "scae"):
                stage = planned_by(method)
                out[f"undecoded {method}"] = Row(_native.undecoded(stage, image, run), ahead, stage)
    if "torchvision" in args.peers:
        for method in args.methods:
            if method in _peers.BY_TORCHVISION:
                out[f"torchvision {method}"] = workers(_peers.torchvision, method)
        for decoder in list(_peers.DECODERS)[1:]:
            out[decoder] = workers(_peers.torchvision, "random_erasing", decoder=decoder)
    if "timm" in args.peers:
        for method in args.methods:
            if method in _peers.BY_TIMM:
                out[f"timm {method}"] = workers(_peers.timm, method)
    return out


def versus(samples: Mapping[str, Sequence[float]], peer: str) -> dict[str, float]:
    """The median over rounds of each method's rate over that of its counterpart."""
    out = {}
    for name, ours in samples.items():
        theirs = samples.get(f"{peer} {'random_erasing' if name == 'scae' else name}")
        if theirs is not None:
            out[name] = round(
                statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3
            )
    return out


def measure(
    args: argparse.Namespace, chosen: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """One combination -> its rows, and what else is known of them: by name, then by row."""
    tensors = {name: chosen[name] for name in ("dtype", "decode", "layout")}
    image = ImageConfig(size=args.size, val_resize=args.size, **tensors)
    execution = {name: chosen[name] for name in chosen if name not in tensors}
    run = ExecConfig(device_id=args.device_id, **execution)
    index = evened(epoch_index(args.data, args.repeat, run.batch_size))
    batches = args.batches or len(index) // run.batch_size
    with (
        tempfile.TemporaryDirectory() as folder,
        random_cache(os.path.join(folder, "maps.lmdb"), index) as cache,
    ):
        live = live_rows(args, index, cache, image, run)
        settle()
        samples = _bench.interleaved(
            {name: partial(row.measure, batches) for name, row in live.items()}, args.rounds
        )
        found = medians(live)
        live.clear()  # their threads and workers end before those of the next combination begin
        gc.collect()
    settings = {
        **chosen,
        "decode_resolved": resolve_decode(image.decode, args.device_id),
        "images": len(index),
        "batches_per_round": batches,
    }
    table = [{**row, "settings": settings} for row in _bench.rows(samples, "none")]
    return table, found | {f"versus_{peer}": versus(samples, peer) for peer in PEERS}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device_id is not None:
        torch.cuda.set_device(args.device_id)
    panels: dict[str, list[dict[str, Any]]] = {}
    table: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}
    for values in itertools.product(*(getattr(args, name) for name in SWEPT)):
        chosen = dict(zip(SWEPT, values, strict=True))
        differs = [name for name in SWEPT if len(getattr(args, name)) > 1]
        title = ", ".join(SWEPT[name].format(chosen[name]) for name in differs)
        panels[title], found = measure(args, chosen)
        for key, by_row in found.items():
            named = {full_name(name, title): value for name, value in by_row.items()}
            extra.setdefault(key, {}).update(named)
        table += [{**row, "name": full_name(row["name"], title)} for row in panels[title]]
        if args.json is not None:  # a later combination may crash the process, as decoders do
            _bench.write_json(args.json, {**_bench.about(), "rows": table, **extra})
    shared = {
        key: value
        for key, value in table[0]["settings"].items()
        if all(row["settings"][key] == value for row in table)
    }
    extra["settings"] = _bench.settings(args) | shared
    if len(panels) > 1:
        panels = {f"{title} ({rate_of_none(rows):,.0f}/s)": rows for title, rows in panels.items()}
    _bench.report(table, args, extra, panels)


def rate_of_none(rows: Sequence[Mapping[str, Any]]) -> float:
    return next(row["img_per_s"] for row in rows if row["name"] == "none")


def full_name(row: str, title: str) -> str:
    """A row's name among those of all combinations."""
    return f"{row}, {title}" if title else row


if __name__ == "__main__":
    _bench.run(main)
