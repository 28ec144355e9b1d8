"""Does a GPU do what the CPU does? Every pipeline and every method, compared with the CPU's result.

    python tools/gpu_check.py --data imagenet/train --json tools/results/gpu_check.json
    python tools/gpu_check.py --dry-run

Ids, labels, status and boxes must be equal; images may differ by the few grey levels that one JPEG
decoder differs from another. Each check runs in its own process, so that a crash or a hang fails
that check alone; `--jobs` of them run at a time. With `--device-id cpu` the CPU is compared with
itself: a test of the checks. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import fnmatch
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import _gpu_checks_fed  # noqa: F401 - it registers its checks
import numpy as np
import torch
from _gpu_checks import CHECKS, SEED, Setup
from _options import count, device, positive
from PIL import Image

import _bench
import _path  # noqa: F401
from scae_dali.cache import SaliencyCache
from scae_dali.dataset import ImageIndex

COMPARED = 48  # images of --data that the comparing checks use
EVERY = 2000  # and that those use which go through `every` image
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


def run_here(name: str, args: argparse.Namespace) -> None:
    """One check, in this process; what it found is the last line of stdout."""
    faulthandler.dump_traceback_later(0.9 * args.timeout)  # where it hangs, if it does
    if args.device_id is not None:
        torch.cuda.set_device(args.device_id)
    index = ImageIndex(args.data)
    most = EVERY if name.startswith("every-image") else COMPARED
    index = index.subset(np.unique(np.linspace(0, len(index) - 1, most, dtype=np.int64)))
    with tempfile.TemporaryDirectory() as folder:
        cache = SaliencyCache.create(os.path.join(folder, "maps.lmdb"), index, grid=(7, 7))
        ids = cache.begin_pass(0)
        maps = np.random.default_rng(SEED).integers(0, 256, (len(ids), 7, 7), dtype=np.uint8)
        cache.write(ids, maps, epoch=0)
        cache.end_pass(0)
        print(CHECKS[name](Setup(index, cache, args.device_id), *name.split("/")[1:]))


def run_apart(name: str, args: argparse.Namespace) -> dict:
    """One check in a process of its own -> its row of the report."""
    device = "cpu" if args.device_id is None else str(args.device_id)
    command = [sys.executable, "-X", "faulthandler", __file__, "--check", name]
    command += ["--data", args.data, "--device-id", device, "--timeout", str(args.timeout)]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            code = child.wait(args.timeout)
            how = f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            child.kill()  # and no wait: a process stuck in a driver does not die
            code, how = None, f"no end after {args.timeout} s"
        seconds = round(time.monotonic() - start, 1)
        for stream in (out, err):
            stream.seek(0)
        if code == 0:
            return {"name": name, "ok": True, "seconds": seconds, "detail": out.read().strip()}
        tail = err.read()[-2000:].strip()
        return {"name": name, "ok": False, "seconds": seconds, "detail": f"{how}; stderr: {tail}"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="DIR/<class>/<image>; default: drawn images")
    parser.add_argument("--device-id", type=device, default="0", metavar="N|cpu")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="such as 'train/scae/*'")
    parser.add_argument("--timeout", type=positive, default=120, metavar="SECONDS", help="a check")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="checks at a time")
    parser.add_argument("--dry-run", action="store_true", help="list the checks; needs no GPU")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT")
    parser.add_argument("--check", choices=CHECKS, metavar="NAME", help="run this one right here")
    args = parser.parse_args(argv)
    args.names = [
        name
        for name in CHECKS
        if name == args.only or (fnmatch.fnmatch(name, args.only) and not name.startswith("_"))
    ]
    if not args.names:
        parser.error(f"--only {args.only}: there is no such check; --dry-run lists them")
    found = torch.cuda.device_count()
    if not args.dry_run and args.device_id is not None and args.device_id >= found:
        parser.error(
            f"--device-id {args.device_id}: this machine has {found} GPUs that torch can use; "
            "--dry-run lists the checks without one, --device-id cpu tries their code"
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
        if args.check:
            run_here(args.check, args)
            return 0
        rows = {}
        with ThreadPoolExecutor(args.jobs) as pool:
            names = sorted(args.names, key=lambda name: not name.startswith(LONGEST))
            for done in as_completed([pool.submit(run_apart, name, args) for name in names]):
                row = done.result()
                rows[row["name"]] = row
                mark = "ok  " if row["ok"] else "FAIL"
                print(f"{mark} {row['name']} ({row['seconds']} s): {row['detail']}", flush=True)
    results = [rows[name] for name in args.names]
    failed = sum(not row["ok"] for row in results)
    print(f"{len(results) - failed} of {len(results)} checks passed")
    if args.json:
        _bench.write_json(args.json, {**_bench.about(), "checks": results})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
