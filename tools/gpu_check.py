"""Compare every pipeline and every method on a GPU with the same on the CPU.

    python tools/gpu_check.py --data imagenet --json tools/results/gpu_check.json
    python tools/gpu_check.py --dry-run

Ids, labels, status and boxes must be equal; images may differ by a few grey levels, as JPEG
decoders do. The checks run in processes of their own, `--jobs` at a time; a check that fails ends
its process, so that a crash or a hang fails that check alone. With `--device cpu` the CPU is
compared with itself, to test the checks. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import fnmatch
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scae_dali.cache import SaliencyCache
from scae_dali.commands.program import run_program
from scae_dali.data.index import ImageIndex
from tools.common.about import about, write_json
from tools.common.options import (
    add_data,
    add_device,
    count,
    device,
    output_file,
    parser_of,
    positive,
)
from tools.gpu import of_files, of_memory  # noqa: F401 - they register their checks
from tools.gpu.checks import CHECKS, SEED, Setup

COMPARED = 48  # images of --data in the checks that compare
EVERY = 2000  # images of --data in the checks of `every` image
LONGEST = ("compile", "harvest/reduce-overhead", "every-image")  # these begin first


def draw_images(root: Path) -> None:
    """A few JPEGs of several shapes, among them a grey and a rotated one."""
    rng = np.random.default_rng(SEED)
    for i in range(24):
        h, w = rng.integers(180, 520, 2).tolist()
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        image = coarse.resize((w, h), Image.Resampling.BICUBIC)
        exif = image.getexif()
        exif[0x0112] = 6 if i == 3 else 1  # orientation
        folder = root / f"class{i % 4}"
        folder.mkdir(exist_ok=True)
        image.convert("L" if i == 5 else "RGB").save(folder / f"{i:02}.jpg", quality=90, exif=exif)


def run_here(name: str, args: argparse.Namespace) -> str:
    """Run one check in this process; returns what it found."""
    faulthandler.dump_traceback_later(0.9 * args.timeout)  # where it hangs, if it does
    index = ImageIndex(args.data)
    most = EVERY if name.startswith("every-image") else COMPARED
    index = index.subset(np.unique(np.linspace(0, len(index) - 1, most, dtype=np.int64)))
    with tempfile.TemporaryDirectory() as folder:
        cache = SaliencyCache.create(os.path.join(folder, "maps.lmdb"), index, grid=(7, 7))
        ids = cache.begin_pass(0)
        maps = np.random.default_rng(SEED).integers(0, 256, (len(ids), 7, 7), dtype=np.uint8)
        cache.write(ids, maps, epoch=0)
        cache.end_pass(0)
        found = CHECKS[name](Setup(index, cache, args.device_id), *name.split("/")[1:])
    gc.collect()  # pipelines, and their memory on the GPU
    faulthandler.cancel_dump_traceback_later()
    return found


def serve(args: argparse.Namespace) -> None:
    """Run the checks that are named on stdin, and answer each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a check prints must not look like an answer
    if args.device_id is not None:
        torch.cuda.set_device(args.device_id)
    for line in sys.stdin:
        print(json.dumps(run_here(line.strip(), args)), file=answers, flush=True)


class Server:
    """A process that serves checks until one of them fails; `alive` tells whether it still does."""

    def __init__(self, args: argparse.Namespace) -> None:
        device = "cpu" if args.device_id is None else str(args.device_id)
        command = [sys.executable, "-X", "faulthandler", __file__, "--serve", "--data", args.data]
        command += ["--device", device, "--timeout", str(args.timeout)]
        self._timeout = args.timeout
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True
        )
        self.alive = True

    def check(self, name: str) -> dict:
        """Run a check; returns its row of the report."""
        start = time.monotonic()
        self._errors.seek(0)  # for the process too, which shares the file's position
        self._errors.truncate()
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        with suppress(BrokenPipeError):  # the process may have ended
            print(name, file=requests, flush=True)
        answer, how = "", f"no end after {self._timeout} s"
        if select.select([answers], [], [], self._timeout)[0]:
            answer = answers.readline()
            how = "" if answer else ended(self._process.wait())
        row = {"name": name, "ok": bool(answer), "seconds": round(time.monotonic() - start, 1)}
        if answer:
            return row | {"detail": json.loads(answer)}
        self._process.kill()  # and no wait: a process stuck in a driver does not die
        self.alive = False
        self._errors.seek(0)
        return row | {"detail": f"{how}; stderr: {self._errors.read()[-2000:].strip()}"}

    def close(self) -> None:
        self._process.kill()
        self._errors.close()


def ended(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def run_all(args: argparse.Namespace) -> list[dict]:
    """The rows of all checks, --jobs at a time; each is printed, and written, when it is known."""
    servers: list[Server] = []  # the idle ones
    rows: dict[str, dict] = {}
    told = about() if args.json else {}
    lock = threading.Lock()

    def found() -> list[dict]:
        return [rows[name] for name in args.names if name in rows]

    def run(name: str) -> None:
        try:
            server = servers.pop()
        except IndexError:  # another thread may have taken the last
            server = Server(args)
        row = server.check(name)
        if server.alive:
            servers.append(server)
        mark = "ok  " if row["ok"] else "FAIL"
        print(f"{mark} {name} ({row['seconds']} s): {row['detail']}", flush=True)
        with lock:
            rows[name] = row
            if args.json:
                complete = len(rows) == len(args.names)
                write_json(args.json, {**told, "complete": complete, "checks": found()})

    names = sorted(args.names, key=lambda name: not name.startswith(LONGEST))
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(run, names):  # raises what one raised
            pass
    for server in servers:
        server.close()
    return found()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_data(
        parser,
        help="folder of the data set, with images in DIR/train/<class>/; default: the command "
        "draws images",
    )
    add_device(parser, "0", type=device)
    parser.add_argument(
        "--only",
        default="*",
        metavar="A,B,...",
        help="names or patterns of the checks to run, such as 'val/*,train/scae/*'; default: all",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=120,
        metavar="SECONDS",
        help="seconds after which a check is stopped; default: %(default)s",
    )
    parser.add_argument(
        "--jobs",
        type=count,
        default=1,
        metavar="N",
        help="how many checks run at once; default: %(default)s",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only list the checks, for which no GPU is needed"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="OUT", help="write the results to OUT as JSON"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = [
        name
        for name in CHECKS
        for pattern in args.only.split(",")
        if name == pattern or (fnmatch.fnmatch(name, pattern) and not name.startswith("_"))
    ]
    args.names = list(dict.fromkeys(args.names))
    if not args.names:
        parser.error(f"--only {args.only}: there is no such check; --dry-run lists them")
    found = torch.cuda.device_count()
    if not args.dry_run and args.device_id is not None and args.device_id >= found:
        parser.error(
            f"--device {args.device_id}: this machine has {found} GPUs that torch can use; "
            "--dry-run lists the checks without one, --device cpu tries their code"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.dry_run:
        print("\n".join(args.names))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            draw_images(Path(folder))
            args.data = folder
        if args.serve:
            serve(args)
            return 0
        results = run_all(args)
    failed = sum(not row["ok"] for row in results)
    print(f"{len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
