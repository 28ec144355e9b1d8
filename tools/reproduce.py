"""Train the cells of a table of the paper with several seeds, and report them beside its figures.

    python tools/reproduce.py --table 3 --data DIR --out runs --dry-run    # what, and how long
    python tools/reproduce.py --table 3 --data DIR --out runs --jobs 2
    python tools/reproduce.py --table 3 --out runs --report                # what there is so far
    python tools/reproduce.py --table lt --data DIR --out runs --jobs 2 --budget 600

Every run is one of train.py, in OUT/table<N>/<section>-<network>-<cell>-s<seed>. The same command
goes on after Ctrl-C, a kill or a failure: finished runs are left alone, the others are resumed.
Options after `--` go to train.py, as in `-- --data.format folder --threads 1`. They cannot change
what a cell sets itself, nor make two cells the same. With --budget the command ends in time, with
exit status 3 if runs are left.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scae_dali.commands.program import run_program
from tools import ROOT
from tools.common import runs
from tools.common.about import about, write_json
from tools.common.options import add_data, output_file, parser_of
from tools.paper.archive import check_unpacked, ended, pack
from tools.paper.jobs import STARTS, Job, existing, finished, plan, read_starts, refuse_others, twin
from tools.paper.report import collect, draw, show
from tools.paper.tables import TABLES, folder
from tools.paper.times import Times, note

TRAIN = ROOT / "train.py"
POLL_S = 0.2
END_S = 10.0  # of the budget, for this command's own start, the archive and the report
TIME_IS_UP = 3  # exit status
# Options of train.py that the table and this command's own options decide.
OURS = {
    *("data.root", "epochs", "method", "model", "out", "resume", "seed"),
    *("config", "evaluate", "help", "print_config", "second_stage.weights"),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--table",
        required=True,
        choices=[*TABLES],
        help="number of the table in the paper; lt is a table of our own, of losses and "
        "augmentations on CIFAR-100-LT",
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
        type=output_file,
        metavar="FILE",
        help="file of the report; default: table<N>.json in --out",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="how long the command may take: it begins no run that would not end in time, and "
        "stops at a checkpoint what has not ended then; the same command goes on; default: no "
        "limit",
    )
    parser.add_argument(
        "--archive",
        type=output_file,
        metavar="FILE",
        help="write what is needed to go on elsewhere into this compressed tar file at the end, to "
        "be unpacked into another --out",
    )
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="options for train.py")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.place = args.out / folder(args.table)
    args.json = args.json or args.place.with_suffix(".json")
    args.deadline = time.monotonic() + args.budget - END_S if args.budget else math.inf
    table = TABLES[args.table]
    args.models = args.models or list(table.models)
    for name in ("seeds", "jobs", "epochs", "rate", "budget"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be positive, got {value}")
    if args.budget and args.budget <= END_S:
        parser.error(
            f"--budget must be above {END_S:g} seconds, which the command itself takes, got "
            f"{args.budget:g}"
        )
    if args.data is None and not args.report:
        parser.error("--data must name the images' folder, got none; only --report needs none")
    sections = [section.name for section in table.sections]
    cells = dict.fromkeys(cell.name for section in table.sections for cell in section.cells)
    for name, known in (("sections", sections), ("methods", [*cells])):
        if odd := sorted({*(getattr(args, name) or ())} - {*known}):
            parser.error(f"--{name} must be of {', '.join(known)}; got {', '.join(odd)}")
    for text in args.options:
        if text.startswith("--") and (option := text[2:].partition("=")[0]) in OURS:
            what = "give the settings of the file one by one" if option == "config" else (
                "the table decides it, or an option before the --"
            )  # fmt: skip
            parser.error(f"--{option} cannot be passed on to train.py: {what}")
    return args


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


class Running:
    """A run that trains now. epoch_s: seconds that an epoch is thought to take."""

    def __init__(self, job: Job, child: subprocess.Popen, epoch_s: float) -> None:
        self.job, self.child, self.since = job, child, time.monotonic()
        self._saved, self._saved_at, self._every = self._checkpoint(), math.nan, epoch_s

    def is_to_stop(self, deadline: float) -> bool:
        """Whether its last checkpoint before the deadline has just been written, or time is up."""
        now, saved = time.monotonic(), self._checkpoint()
        if saved == self._saved:
            return now > deadline
        if not math.isnan(self._saved_at):
            self._every = now - self._saved_at
        self._saved, self._saved_at = saved, now
        return now + self._every > deadline and self.job.epochs_left > 1  # the last may come

    def _checkpoint(self) -> int:
        path = self.job.path / "checkpoint.pt"
        return path.stat().st_mtime_ns if path.exists() else 0


def execute(
    args: argparse.Namespace, times: Times, jobs: Sequence[Job]
) -> tuple[list[str], list[Job]]:
    """Run what is not finished, `args.jobs` at once. Returns the runs that failed or were left to
    others, and those for which time was too short."""
    for job in jobs:
        if job.path.is_symlink() and not job.path.exists():
            job.path.unlink(missing_ok=True)  # the run of another table is gone
        if (other := twin(args, job, jobs)) is not None:
            args.place.mkdir(parents=True, exist_ok=True)
            job.path.symlink_to(os.path.relpath(other, args.place))
            print(f"have   {job.path.name}: it is {other.relative_to(args.out)}")
    waiting = [job for job in jobs if not finished(job, jobs)]
    total = len(waiting)
    print(estimate(args, times, waiting), flush=True)
    args.time_s = args.deadline - time.monotonic()  # for runs
    args.begun = False
    lost: list[str] = []
    cut: list[Job] = []
    running: dict[int, Running] = {}
    free = True  # whether a run may be begun that could not before
    try:
        while free or running:
            if free:
                if args.budget:
                    times.read()
                begin(args, jobs, times, waiting, running, lost)
                free = False
            for slot, run in list(running.items()):
                if run.child.poll() is None:
                    continue
                free = True
                del running[slot]
                ended = f"{total - len(waiting) - len(running) - len(cut)} of {total}"
                seconds = time.monotonic() - run.since
                if not tell(run.job, jobs, run.child.returncode, seconds, ended):
                    lost.append(run.job.path.name)
            late = [slot for slot, run in running.items() if run.is_to_stop(args.deadline)]
            runs.stop([running[slot].child for slot in late])
            for slot in late:
                cut.append(running.pop(slot).job)
                done = cut[-1].config.epochs - cut[-1].epochs_left
                print(f"stop   {cut[-1].path.name}: {done} epochs done, for time is up", flush=True)
            for job in list(waiting):
                if job.first is not None and job.first.name in lost:
                    waiting.remove(job)
                    lost.append(job.path.name)
                    print(f"leave  {job.path.name}: it goes on from {job.first.name}")
            if running:
                time.sleep(POLL_S)
    finally:
        runs.stop([run.child for run in running.values()])
    return lost, cut + waiting


def begin(
    args: argparse.Namespace,
    jobs: Sequence[Job],
    times: Times,
    waiting: list[Job],
    running: dict[int, Running],
    lost: list[str],
) -> None:
    """Begin runs, the first that wait and can end in time, until `args.jobs` are running.

    A run that no call has time for is begun all the same if its next epoch can end in time, or half
    of the time is left. It ends in a later call.
    """

    def fits(job: Job, rest: float) -> bool:
        if times.left(job) > args.time_s:
            return rest > min(times.first(job), args.time_s / 2)
        return not rest < times.left(job)  # which may be unknown

    free = sorted(set(range(args.jobs)) - running.keys())
    while free:
        busy = {run.job.path for run in running.values()}
        able = [job for job in waiting if ready(job, jobs) and job.first not in busy]
        rest = args.deadline - time.monotonic()
        if rest < args.time_s:
            able = [job for job in able if fits(job, rest)]
        if not able or rest <= 0:
            return
        job = able[0]
        waiting.remove(job)
        child = launch(args, job, free[0])
        if child is None:
            lost.append(job.path.name)
        else:
            running[free.pop(0)] = Running(job, child, times.epoch(job))
            args.begun = True


def ready(job: Job, jobs: Sequence[Job]) -> bool:
    return all(finished(other, jobs) for other in jobs if other.path == job.first)


def launch(args: argparse.Namespace, job: Job, slot: int) -> subprocess.Popen | None:
    """Start or resume a run, and note the machine; None if another process is running it."""
    told = {
        **about(),
        "command": shlex.join(["python", "train.py", *job.options]),
        "options": args.options,
        "data": job.index.fingerprint if job.index is not None else None,
        **note(args, job, time.time()),
    }
    env = runs.environment(slot, args.jobs, job.config.device)
    child = runs.start(job.path, [sys.executable, str(TRAIN), *job.options], env)
    if child is None:
        print(f"leave  {job.path.name}: another process is at it")
        return None
    try:
        write_json(job.path / STARTS, [*read_starts(job.path), told])
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


def changed_recipe(job: Job) -> str:
    """A note where options after -- change what sets a cell apart."""
    if not job.overridden:
        return ""
    odd = [f"{name} is {now}, not {was}" for name, (now, was) in job.overridden.items()]
    return (
        f"note: options after -- change settings of {job.cell.recipes[-1]}.yaml in the cell "
        f"{job.cell.name}: {', '.join(odd)}\n"
    )


def describe(args: argparse.Namespace, times: Times, jobs: Sequence[Job]) -> None:
    """The plan: every run with its command, and what is left to do."""
    print(f"Table {args.table}: {TABLES[args.table].title}, {len(jobs)} runs in {args.place}")
    left: list[Job] = []
    for job in jobs:
        other = twin(args, job, jobs)
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
    print(estimate(args, times, left))


def estimate(args: argparse.Namespace, times: Times, jobs: Sequence[Job]) -> str:
    """What is left to do, in words: runs, epochs, images and time."""
    start = f"left: {len(jobs)} runs, {sum(job.epochs_left for job in jobs):,} epochs"
    if any(job.epoch_images is None for job in jobs):
        return f"{start}; image-steps and time unknown: --data cannot be read"
    total = sum(job.epochs_left * (job.epoch_images or 0) for job in jobs)
    seconds = sum(times.left(job) for job in jobs)
    text = f"{start}, {total:,} image-steps"
    if math.isnan(seconds):
        return f"{text}; time unknown: give --rate, or let a run of each network begin"
    sources = ["the rate of the runs in --out"] * bool(times.measured) + [
        f"the rate of a few steps of {model}, {1 / pace:.3g} img/s a run"
        for model, pace in times.tried.items()
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
    """Do what the command line asks for; returns the exit status: 1 if runs failed, another process
    has them or they could not be packed, else TIME_IS_UP if the budget was too short for some."""
    if args.archive and not args.dry_run:
        check_unpacked(args.place, args.archive)
    lost: list[str] = []
    left: list[Job] = []
    times = Times(args, probe=args.dry_run or args.budget is not None)
    try:
        if not args.report:
            refuse_others(args)
            jobs = plan(args)
            for told in dict.fromkeys(map(changed_recipe, jobs)):
                print(told, end="", file=sys.stderr)
            if args.dry_run:
                describe(args, times, jobs)
                return 0
            lost, left = execute(args, times, jobs)
    finally:
        packed = args.dry_run or not args.archive or archived(args)
    if lost:
        print(f"not done: {', '.join(lost)}; the same command tries again", file=sys.stderr)
    if left:
        times.read()
        goes_on = "the same command goes on" if args.begun else "give a longer --budget"
        print(f"time is up, {estimate(args, times, left)}; {goes_on}", file=sys.stderr)
    if not left or any(ended(path) for path, *_ in existing(args)):
        found = collect(args)
        show(found)
        write_json(args.json, found)
        draw(found, args.place.with_suffix(".png"))
    return 1 if lost or not packed else TIME_IS_UP if left else 0


def archived(args: argparse.Namespace) -> bool:
    """Pack the runs; returns False, and tells why, where that is not possible. Their report must
    not be lost with it."""
    try:
        if packed := pack(args, args.archive):
            print(f"packed {packed} runs into {args.archive}", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(run_program(main))
