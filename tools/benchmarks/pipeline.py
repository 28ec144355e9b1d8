"""Measure the speed of the training pipeline by method, and of what other libraries do.

    python tools/benchmark.py pipeline --data imagenet --json tools/results/pipeline_cpu.json
    python tools/benchmark.py pipeline --data imagenet --methods none,scae --peers native \
        --threads 1,2 --batch-size 64,256 --dtype fp32,fp16 --decode roi,full --json sweep.json
    python tools/benchmark.py pipeline --data imagenet --methods none --peers none \
        --mixed-share 0.01,0.09,0.28 --json tools/results/mixing_cpu.json
    python tools/benchmark.py pipeline --data imagenet --methods none,scae --peers none --tars 4 \
        --json tools/results/tars_cpu.json
    python tools/benchmark.py pipeline --source memory --methods none,random_erasing,scae \
        --batch-size 128 --json tools/results/arrays_cpu.json

There is a row for each method, or for several joined by +; `none (again)`, a second pipeline like
`none`, shows the noise. With files there are also the rows of --peers:
native       `native METHOD`: DALI's own counterpart of a method, with DALI's random numbers, on the
             crops of `none`. `native none`: DALI's own crop and flip without any Python, which
             shows the cost of `none`'s plan. `decode alone`: files are read and decoded whole, the
             fastest that the decoder allows (a `roi` decoder may skip parts, and be faster).
             `undecoded METHOD`, for none and SCAE: files are read and crops planned, which is the
             CPU's work if a GPU decodes. Then the slower of the two sets the pace.
torchvision  `torchvision METHOD`: torchvision's counterpart, in a DataLoader with as many workers
             as DALI has threads, decoded with Pillow as ImageFolder does. `torchvision
             (decode_image)`: Random Erasing with torchvision's own decoder.
timm         `timm METHOD`: timm's counterpart, by its create_loader; on the CPU without prefetcher.
`ratio` is a row's rate over that of `none`; `versus_native`, `versus_torchvision` and `versus_timm`
are those over the counterparts, which for SCAE are those of Random Erasing.
`cpu_ms_per_image` is CPU time, which other load on the machine changes less. `plan_ms_per_batch` is
spent in a thread beside DALI's.

All rows live at once and take turns. Methods have their default settings. SCAE runs where λ is
largest, with a cache of random maps; all classes have one size, so that nothing is mixed.
`mixed_share` is the share of samples that were mixed.

--mixed-share S relabels the images: a share of 2·S, drawn at random, becomes a tail of small
classes, whose samples SCAE mixes with probability 0.5; the others are one class. So about a share S
of all is mixed. Rows: `mixed S`; `unmixed S`, the same data with mix_prob=0, which is the
`baseline` of both ratios. `versus_second_decode` is the ratio over 1 / (1 + S), what it would be if
the decoding of the second images were all that it costs. Goal: 0.95.

--tars N packs the files into N tars, and adds the rows `METHOD, tars`, which read these.
`tars_versus_files` are their rates over those of the same methods on the files.

--source memory takes images from memory, as small as CIFAR's, shifted by up to 4 pixels instead of
cropped. The row `scae, long tail` has them in classes as large as those of CIFAR-100-LT, so that
samples are mixed. Goals on two cores: 50,000 img/s for none, 0.95 of it for SCAE.

--threads, --batch-size, --prefetch, --dtype, --decode, --layout and --hw-decoder-load take several
values, A,B,...: every combination is measured, one after the other, with ratios to its own `none`,
and the names of the rows say what differs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from pipelines.config import ExecConfig
from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.methods import BUILT_IN, compose
from scae_dali.stage.images import resolve_decode
from tools.benchmarks import peers
from tools.benchmarks.pipeline_rows import IN_TARS, Rows
from tools.common import bench
from tools.common.about import about, write_json
from tools.common.live import medians, settle
from tools.common.made_up import random_cache
from tools.common.options import (
    add_batch_size,
    add_device,
    count,
    shares,
    some_of,
    whole_numbers,
)
from tools.common.source import add_source, check_source, open_source

PEERS = ("native", "torchvision", "timm")
# Options whose combinations are all measured -> how the names of rows show their values.
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
    parser = bench.parser_of(__doc__, __name__)
    add_source(parser)
    parser.add_argument(
        "--methods",
        default=",".join(BUILT_IN),
        metavar="A,B,...",
        help="methods to measure; none must be among them; default: all",
    )
    parser.add_argument(
        "--backends",
        type=some_of("python", "torch", "numpy"),
        default="python",
        metavar="A,B",
        help="operators of DALI that run the plan: python (numpy is the same), torch, or both; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--peers",
        type=some_of(*PEERS, "none"),
        default=",".join(PEERS),
        metavar="A,B,...",
        help="whom to compare with, or none; they read files; default: all",
    )
    parser.add_argument(
        *("--mixed-share", "--tail-share"),
        type=shares,
        default=[],
        metavar="S,...",
        help="measure SCAE also with this share of the images mixed, above 0 and at most 0.4",
    )
    parser.add_argument(
        "--tars",
        type=count,
        metavar="N",
        help="measure the methods also on the images packed into N tars; for --source files",
    )
    parser.add_argument(
        "--grid",
        type=count,
        help="cells on a side of a saliency map; default: 7, or 8 for images in memory",
    )
    parser.add_argument(
        "--batches", type=count, help="batches of a row in a round; default: one epoch"
    )
    add_device(parser)
    several = partial(parser.add_argument, metavar="A,B,...")
    several(
        "--threads",
        type=whole_numbers,
        default="2",
        help="CPU threads of DALI; default: %(default)s",
    )
    add_batch_size(parser, "64", "images in a batch", type=whole_numbers, metavar="A,B,...")
    ahead, load = str(ExecConfig.prefetch), str(ExecConfig.hw_decoder_load)
    several(
        "--prefetch",
        type=whole_numbers,
        default=ahead,
        help="batches that DALI makes ahead; default: %(default)s",
    )
    several(
        "--hw-decoder-load",
        type=shares,
        default=load,
        help="share of a batch, from 0 to 1, that the GPU's JPEG engine decodes; default: "
        "%(default)s",
    )
    several(
        "--dtype",
        type=some_of("fp32", "fp16"),
        default="fp32",
        help="type of the images: fp32, fp16; default: %(default)s",
    )
    several(
        "--layout",
        type=some_of("NCHW", "NHWC"),
        default="NCHW",
        help="memory layout of the images: NCHW, NHWC; default: %(default)s",
    )
    several(
        "--decode",
        type=some_of("auto", "roi", "full"),
        default="auto",
        help="what is decoded: the crop (roi), the whole image (full), or auto; default: "
        "%(default)s",
    )
    args = bench.parse(
        parser,
        argv,
        rounds=5,
        quick={"rounds": 3, "batches": 3, "images": 4096, "peers": "native"},
    )
    check_source(parser, args)
    args.methods = list(dict.fromkeys(part.strip() for part in args.methods.split(",")))
    args.peers = [peer for peer in args.peers if peer != "none" and args.source == "files"]
    if "none" not in args.methods:
        parser.error("--methods must name none, the row that the ratios are to")
    try:
        parts = {part for name in args.methods for part in compose.split(name)}
    except ValueError as error:
        parser.error(f"--methods: {error}")
    if unknown := parts - set(BUILT_IN):
        parser.error(f"--methods: no method {', '.join(unknown)}; there are {', '.join(BUILT_IN)}")
    if not all(0 < share <= 0.4 for share in args.mixed_share):
        parser.error("--mixed-share must be shares of the samples, above 0 and at most 0.4")
    if args.source == "memory":
        if args.tars:
            parser.error("--tars packs files, got --source memory")
        if "torch" in args.backends:
            parser.error(
                "--backends torch is for --source files, got --source memory: images in memory are "
                "erased where they are cropped, by no operator"
            )
    if "timm" in args.peers and not peers.has_timm():
        print("timm is not installed, so its rows are left out; pip install timm")
        args.peers.remove("timm")
    return args


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


def tars_versus_files(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median over rounds of the rate of each row of tars over that of its method on files."""
    out = {}
    for name, rates in samples.items():
        method = name.removesuffix(IN_TARS)
        if method != name:
            ratios = [a / b for a, b in zip(rates, samples[method], strict=True)]
            out[method] = round(statistics.median(ratios), 3)
    return out


def measure(
    args: argparse.Namespace, chosen: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Measures one combination; returns its rows, and further figures: name -> row -> figure."""
    tensors = {name: chosen[name] for name in ("dtype", "decode", "layout")}
    others = {name: chosen[name] for name in chosen if name not in tensors}
    execution = ExecConfig(device_id=args.device_id, **others)
    source = open_source(args, execution.batch_size)
    image = source.image(args.size, **tensors)
    batches = args.batches or len(source.index) // execution.batch_size
    side = args.grid or (7 if args.source == "files" else 8)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def new_cache(name: str, index: ImageIndex) -> SaliencyCache:
            path = os.path.join(folder, f"{name}.lmdb")
            return stack.enter_context(random_cache(path, index, (side, side)))

        rows = Rows(source, image, execution, new_cache)
        rows.add_methods(args.methods, args.backends)
        if args.source == "memory" and "scae" in args.methods:
            rows.add_long_tail()
        if args.tars:
            rows.add_tars(args.methods, folder, args.tars)
        for share in args.mixed_share:
            rows.add_mixed(share)
        for peer in args.peers:
            getattr(rows, f"add_{peer}")(args.methods)
        settle()
        samples = bench.interleaved(
            {name: partial(row.measure, batches) for name, row in rows.live.items()}, args.rounds
        )
        found = medians(rows.live)
        found["mixed_share"] = {name: counter.share for name, counter in rows.counts.items()}
        rows.live.clear()
        gc.collect()  # their threads and workers end before the next combination begins
    settings = {
        **chosen,
        "decode_resolved": resolve_decode(image.decode, args.device_id),
        "images": len(source.index),
        "batches_per_round": batches,
    }
    table = [{**row, "settings": settings} for row in ratios(samples, rows.baselines)]
    found["tars_versus_files"] = tars_versus_files(samples)
    found["versus_second_decode"] = {
        row["name"]: round(row["ratio"] * (1 + found["mixed_share"][row["name"]]), 3)
        for row in table
        if row["name"].startswith("mixed ")
    }
    return table, found | {f"versus_{peer}": versus(samples, peer) for peer in PEERS}


def ratios(
    samples: Mapping[str, Sequence[float]], baselines: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows with ratios to their baselines; a row names its baseline unless it is `none`."""
    table = []
    for base in dict.fromkeys(baselines.values()):
        alike = {name: rates for name, rates in samples.items() if baselines[name] == base}
        told = {} if base == "none" else {"baseline": base}
        table += [{**row, **told} for row in bench.rows(alike, base)]
    return table


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device_id is not None:
        torch.cuda.set_device(args.device_id)
    if len(args.batch_size) > 1:
        open_source(args, max(args.batch_size))  # it ends the program where there are too few
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
            write_json(args.json, {**about(), "rows": table, **extra})
    shared = {
        key: value
        for key, value in table[0]["settings"].items()
        if all(row["settings"][key] == value for row in table)
    }
    extra["settings"] = bench.settings(args) | shared
    if len(panels) > 1:
        panels = {f"{title} ({rate_of_none(rows):,.0f}/s)": rows for title, rows in panels.items()}
    bench.report(table, args, extra, panels)


def rate_of_none(rows: Sequence[Mapping[str, Any]]) -> float:
    return next(row["img_per_s"] for row in rows if row["name"] == "none")


def full_name(row: str, title: str) -> str:
    """A row's name with that of its combination."""
    return f"{row}, {title}" if title else row
