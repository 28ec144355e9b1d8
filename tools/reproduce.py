"""Train the cells of a table of the paper with several seeds, and report them beside its figures.

    python tools/reproduce.py --table 3 --data DIR --out runs --dry-run    # what, and how long
    python tools/reproduce.py --table 3 --data DIR --out runs --jobs 2
    python tools/reproduce.py --table 3 --out runs --report                # what there is so far

Every run is one of train.py, in OUT/table<N>/<section>-<network>-<cell>-s<seed>. The same command
goes on after Ctrl-C, a kill or a failure: finished runs are left alone, the others are resumed.
Options after `--` go to train.py, as in `-- --data.format folder --threads 1`; they cannot change
the settings that define a cell.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools import ROOT
from tools.common import runs
from tools.common.about import about, write_json
from tools.common.options import add_data, parser_of
from tools.paper.jobs import STARTS, Job, finished, plan, read_starts, refuse_others, twin
from tools.paper.probe import pace
from tools.paper.report import collect, draw, show
from tools.paper.tables import TABLES

TRAIN = ROOT / "train.py"
POLL_S = 0.2
# Options of train.py that the table and this command's own options decide.
OURS = {
    *("data.root", "epochs", "method", "model", "out", "resume", "seed"),
    *("help", "print_config", "second_stage.weights"),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--table",
        type=int,
        required=True,
        choices=sorted(TABLES),
        help="number of the table in the paper",
    )
    add_data(parser, type=str, help="folder of the data set, as --data.root of train.py")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the runs and the report"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="number of seeds for each cell; the seeds are 0, 1, 2, …; default: %(default)s",
    )
    parser.add_argument(
        "--methods",
        type=_names,
        metavar="A,B",
        help="methods (rows of the table) to train; default: all",
    )
    parser.add_argument(
        "--sections",
        type=_names,
        metavar="A,B",
        help="sections of the table to train; default: all",
    )
    parser.add_argument(
        "--models",
        type=_names,
        metavar="A,B",
        help="networks to train; default: those of the table",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="how many runs train at once; default: %(default)s"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help="number of epochs, instead of the recipe's; schedules are shortened in proportion",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="IMG_PER_S",
        help="images per second of one run, from which the time is estimated; default: it is "
        "measured",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print which runs are left, and about how long they take",
    )
    parser.add_argument("--report", action="store_true", help="only report the runs that there are")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="file of the report; default: table<N>.json in --out",
    )
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="options for train.py")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.place = args.out / f"table{args.table}"
    args.json = args.json or args.out / f"table{args.table}.json"
    table = TABLES[args.table]
    args.models = args.models or list(table.models)
    for name in ("seeds", "jobs", "epochs", "rate"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be positive, got {value}")
    if args.data is None and not args.report:
        parser.error("--data must name the images' folder, got none; only --report needs none")
    sections = [section.name for section in table.sections]
    cells = dict.fromkeys(cell.name for section in table.sections for cell in section.cells)
    for name, known in (("sections", sections), ("methods", [*cells])):
        if odd := sorted({*(getattr(args, name) or ())} - {*known}):
            parser.error(f"--{name} must be of {', '.join(known)}; got {', '.join(odd)}")
    for text in args.options:
        if text.startswith("--") and (option := text[2:].partition("=")[0]) in OURS:
            parser.error(f"--{option} cannot be passed on to train.py: the table decides it, or an "
                         "option before the --")  # fmt: skip
    return args


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def execute(args: argparse.Namespace, jobs: Sequence[Job]) -> list[str]:
    """Run what is not finished, `args.jobs` at once; returns the runs that failed or were left."""
    for job in jobs:
        if (other := twin(args, job)) is not None:
            args.place.mkdir(parents=True, exist_ok=True)
            job.path.symlink_to(os.path.relpath(other, args.place))
            print(f"have   {job.path.name}: it is {other.relative_to(args.out)}")
    waiting = [job for job in jobs if not finished(job, jobs)]
    total = len(waiting)
    print(estimate(args, waiting), flush=True)
    lost: list[str] = []
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    try:
        while waiting or running:
            for slot in set(range(args.jobs)) - running.keys():
                busy = {job.path for job, *_ in running.values()}
                able = [job for job in waiting if ready(job, jobs) and job.first not in busy]
                if not able:
                    break
                waiting.remove(able[0])
                child = launch(args, able[0], slot)
                if child is None:
                    lost.append(able[0].path.name)
                else:
                    running[slot] = (able[0], child, time.monotonic())
            for slot, (job, child, since) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[slot]
                ended = f"{total - len(waiting) - len(running)} of {total}"
                if not tell(job, jobs, child.returncode, time.monotonic() - since, ended):
                    lost.append(job.path.name)
            for job in list(waiting):
                if job.first is not None and job.first.name in lost:
                    waiting.remove(job)
                    lost.append(job.path.name)
                    print(f"leave  {job.path.name}: it goes on from {job.first.name}")
            if running:
                time.sleep(POLL_S)
    finally:
        runs.stop([child for _, child, _ in running.values()])
    return lost


def ready(job: Job, jobs: Sequence[Job]) -> bool:
    return all(finished(other, jobs) for other in jobs if other.path == job.first)


def launch(args: argparse.Namespace, job: Job, slot: int) -> subprocess.Popen | None:
    """Start or resume a run, and note the machine; None if another process is running it."""
    note = {
        **about(),
        "command": shlex.join(["python", "train.py", *job.options]),
        "options": args.options,
        "data": job.index.fingerprint if job.index is not None else None,
    }
    env = runs.environment(slot, args.jobs, job.config.device)
    child = runs.start(job.path, [sys.executable, str(TRAIN), *job.options], env)
    if child is None:
        print(f"leave  {job.path.name}: another process is at it")
        return None
    try:
        write_json(job.path / STARTS, [*read_starts(job.path), note])
        print(f"start  {job.path.name}: {job.epochs_left} epochs", flush=True)
    except BaseException:
        runs.stop([child])
        raise
    return child


def tell(job: Job, jobs: Sequence[Job], status: int, seconds: float, ended: str) -> bool:
    """Print how a run ended; returns whether it is finished."""
    if status == 0 and finished(job, jobs):
        _, row = runs.read_run(job.path)
        figure = f"top-1 {row['val_top1']:.2f}"
        print(f"done   {job.path.name}: {figure}, {duration(seconds)}; {ended}", flush=True)
        return True
    print(f"failed {job.path.name}: status {status}; {ended}; {runs.LOG} ends with")
    for line in runs.last_lines(job.path / runs.LOG):
        print(f"       | {line}")
    return False


def describe(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """The plan: every run with its command, and what is left to do."""
    print(f"Table {args.table}: {TABLES[args.table].title}, {len(jobs)} runs in {args.place}")
    left: list[Job] = []
    for job in jobs:
        other = twin(args, job)
        if other is not None:
            state = f"done, as {other.relative_to(args.out)}"
        elif finished(job, jobs):
            state = "done"
        else:
            left.append(job)
            done = job.config.epochs - job.epochs_left
            state = f"{done} epochs done" if done else "to do"
        images = "?" if job.epoch_images is None else f"{job.epoch_images:,}"
        print(f"{job.path.name}: {job.config.epochs} epochs of {images} images; {state}")
        print("    " + shlex.join(["python", "train.py", *job.options]).replace(
            f"{ROOT}{os.sep}", ""))  # fmt: skip
    print(estimate(args, left, probe=True))


def estimate(args: argparse.Namespace, jobs: Sequence[Job], probe: bool = False) -> str:
    """What is left to do, in words: runs, epochs, images and time.

    probe: whether a network that has no run yet is tried for a moment.
    """
    start = f"left: {len(jobs)} runs, {sum(job.epochs_left for job in jobs):,} epochs"
    paces: dict[tuple[str, ...], list[float]] = {}
    for file in args.out.glob("table*/*/config.json"):
        config = runs.read_config(file)
        rows = runs.read_rows(file.parent / "metrics.jsonl", runs.PACE)
        if (measured := runs.pace(rows)) is not None:
            model, stage = config["model"], config.get("second_stage", {}).get("classifier") or ""
            for key in ((model, stage, config["method"]), (model, stage), (model,)):
                paces.setdefault(key, []).append(measured)
    total, seconds, tried = 0, 0.0, {}
    for job in jobs:
        if job.epoch_images is None:
            return f"{start}; image-steps and time unknown: --data cannot be read"
        images = job.epochs_left * job.epoch_images
        stage = job.config.second_stage.classifier or ""
        keys = ((job.model, stage, job.cell.method), (job.model, stage), (job.model,))
        known = next((paces[key] for key in keys if key in paces), None)
        total += images
        if args.rate:
            seconds += images / args.rate
        elif known:
            seconds += images * statistics.mean(known)
        elif probe and job.index is not None:
            if job.model not in tried:
                classes = job.index.num_classes
                tried[job.model] = pace(job.config, classes, args.jobs)
            seconds += images * tried[job.model]
        else:
            seconds = math.nan
    text = f"{start}, {total:,} image-steps"
    if math.isnan(seconds):
        return f"{text}; time unknown: give --rate, or let a run of each network begin"
    sources = ["the rate of the runs in --out"] * bool(paces) + [
        f"the rate of a few steps of {model}, {1 / pace:.3g} img/s a run"
        for model, pace in tried.items()
    ]
    source = f"--rate {args.rate:g}" if args.rate else " and ".join(sources)
    return f"{text}; about {duration(seconds / args.jobs)} at {source}, {args.jobs} at once"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop children
    try:
        return run(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit status, 1 if runs are not done."""
    lost: list[str] = []
    if not args.report:
        refuse_others(args)
        jobs = plan(args)
        if args.dry_run:
            describe(args, jobs)
            return 0
        lost = execute(args, jobs)
    if lost:
        print(f"not done: {', '.join(lost)}; the same command tries again", file=sys.stderr)
    found = collect(args)
    show(found)
    write_json(args.json, found)
    draw(found, args.out / f"table{args.table}.png")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
