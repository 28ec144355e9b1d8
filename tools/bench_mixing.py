"""What mixing costs the training pipeline: SCAE with tail classes, beside SCAE that mixes nothing.

    python tools/bench_mixing.py --data imagenet/train --json tools/results/mixing_cpu.json

For each S of --tail-share the images are relabelled: 2·S of them, drawn at random, become a tail of
small classes, whose samples SCAE mixes with probability 0.5; the others are one class. So about the
share S of all is mixed; `mixed_share` is what was counted. Rows: `mixed S`; `unmixed S`, the same
data set with mix_prob=0; for the first S also `none` and `unmixed S (again)`, which shows the noise
floor. `ratio` is a row's rate over that of its own `unmixed S`; goals: 0.95 at 1%, 0.85 at 9%.

As in bench_pipeline.py, SCAE runs where λ is largest, and all rows live at once and take turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial

import torch
from _live import (
    GUIDED,
    SEED,
    Counter,
    Row,
    endless,
    epoch_index,
    long_tailed,
    medians,
    random_cache,
    settle,
)
from _options import count, existing_folder, usable_device

import _bench
import _path  # noqa: F401
from pipelines import train
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.methods.scae import Config as ScaeConfig
from scae_dali.plan.schedule import frequency
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=existing_folder, required=True, metavar="DIR", help="DIR/<class>/<image>"
    )
    parser.add_argument("--tail-share", default="0.01,0.09", metavar="S,...", help="mixed, of all")
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--batches", type=count, help="a round; default: an epoch's")
    parser.add_argument("--repeat", type=count, default=1, help="times each file is in an epoch")
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--size", type=count, default=224, help="side of the crop in pixels")
    parser.add_argument("--device-id", type=usable_device, default="cpu", metavar="N|cpu")
    parser.add_argument("--decode", choices=["auto", "roi", "full"], default="auto")
    args = _bench.parse(
        parser,
        argv,
        rounds=5,
        quick={"rounds": 3, "batches": 3},
    )
    try:
        args.tail_share = [float(share) for share in args.tail_share.split(",")]
    except ValueError:
        args.tail_share = [-1.0]
    if not all(0 < share <= 0.25 for share in args.tail_share):
        parser.error("--tail-share must be shares of the samples, above 0 and at most 0.25")
    return args


def with_tail(index: ImageIndex, share: float) -> ImageIndex:
    """The same files with a tail so large that this share of the samples is mixed."""
    tailed = long_tailed(index, 2 * share)
    if frequency(tailed.class_counts)[1:].max() >= ScaeConfig().tail:
        raise SystemExit(
            f"--data gives {len(index)} images, too few for a tail; pass a larger --repeat"
        )
    return tailed


def live_rows(
    args: argparse.Namespace, index: ImageIndex, folder: str
) -> tuple[dict[str, Row], dict[str, Counter], dict[str, str]]:
    """Every row, running; what is counted of it; and the row that its ratio is to."""
    image = ImageConfig(size=args.size, val_resize=args.size, decode=args.decode)
    run = ExecConfig(batch_size=args.batch_size, device_id=args.device_id, threads=args.threads)
    out: dict[str, Row] = {}
    counts: dict[str, Counter] = {}
    baselines: dict[str, str] = {}

    def add(name: str, baseline: str, of: ImageIndex, method: str, **settings) -> None:
        stage = Stage(of, method, batch_size=args.batch_size, **GUIDED, **settings)
        pipeline = train.train_pipeline(stage, image, run, seed=SEED)
        loader = Loader(pipeline, train.OUTPUTS, of, drop_last=False)
        counts[name] = Counter()
        out[name] = Row(counts[name](endless(loader)), run.prefetch + 1, stage)
        baselines[name] = baseline

    for share in args.tail_share:
        label = f"{100 * share:g}%"
        tailed = with_tail(index, share)
        cache = random_cache(os.path.join(folder, f"{label}.lmdb"), tailed)
        base = f"unmixed {label}"
        add(base, base, tailed, "scae", cache=cache, mix_prob=0.0)
        add(f"mixed {label}", base, tailed, "scae", cache=cache, mix_prob=0.5)
        if share == args.tail_share[0]:
            add(f"{base} (again)", base, tailed, "scae", cache=cache, mix_prob=0.0)
            add("none", base, tailed, "none")
    return out, counts, baselines


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device_id is not None:
        torch.cuda.set_device(args.device_id)
    index = epoch_index(args.data, args.repeat, args.batch_size)
    batches = args.batches or len(index) // args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        live, counts, baselines = live_rows(args, index, folder)
        settle()
        samples = _bench.interleaved(
            {name: partial(row.measure, batches) for name, row in live.items()}, args.rounds
        )
    table = [
        row
        for base in dict.fromkeys(baselines.values())
        for row in _bench.rows({n: s for n, s in samples.items() if baselines[n] == base}, base)
    ]
    settings = _bench.settings(args)
    extra = {
        "baselines": baselines,
        "mixed_share": {name: counter.share for name, counter in counts.items()},
        **medians(live),
        "settings": settings | {"images": len(index), "batches_per_round": batches},
    }
    _bench.report(table, args, extra)


if __name__ == "__main__":
    _bench.run(main)
