"""Find the broken images of a data set before training does, and list them for train.py.

    scae-dali check-images --data /data/imagenet --out broken.txt
    scae-dali check-images --data /data/imagenet --split val --out broken-val.txt
    scae-dali check-images --data /data/tars --format webdataset --archives 'train-*.tar'
    python train.py --data.root /data/imagenet --data.exclude broken.txt \\
        --data.val_exclude broken-val.txt …

--data.exclude leaves out training files alone, --data.val_exclude validation files: paths may be
the same in both folders, so a list is for the folder that it was made of.

Looks at the first and last bytes of every file, and decodes what looks broken; with --decode it
decodes them all, on the CPU, as training does. A JPEG that the decoder mends with a warning is not
broken: it trains as it is. Ends with status 1 where there are broken ones, 2 where it could not
look.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from nvidia.dali import fn, pipeline_def
from tqdm import tqdm

from scae_dali.commands.images import open_archives
from scae_dali.commands.options import (
    add_archives,
    add_data,
    check_format,
    count,
    output_file,
    parser_of,
    train_folder,
)
from scae_dali.data.broken import concerns_images, confirmed, faults
from scae_dali.data.index import ARCHIVES, DatasetError, ImageIndex
from scae_dali.stage.feed import read_batches
from scae_dali.stage.images import decode, read

BATCH = 32
CHUNK = 128 * BATCH  # images a pipeline: a failure costs it, and DALI copies its list of files


def decoded(index: ImageIndex, ids: Sequence[int], threads: int) -> int:
    """How many of `ids`, in this order, a fresh pipeline decodes before one fails.

    Whole batches count; a failed pipeline is lost.
    """
    batch_size = min(BATCH, len(ids))

    def batch(n: int) -> np.ndarray:
        return np.take(ids, range(n * batch_size, (n + 1) * batch_size), mode="wrap")

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None)
    def define():
        if index.archives is None:
            encoded, _ = read(index, ids)
        else:
            encoded = read_batches(index, batch)
        return fn.peek_image_shape(encoded), decode(encoded).shape()

    done = 0
    try:
        pipeline = define()
        while done < len(ids):
            pipeline.run()
            done += batch_size
    except RuntimeError as error:
        if not concerns_images(str(error)):
            raise
    return min(done, len(ids))


def undecodable(
    index: ImageIndex, ids: Sequence[int], threads: int, progress: Callable[[int], object]
) -> Iterator[int]:
    """Those of `ids` that DALI cannot decode, in their order. A failing batch is halved until its
    bad files are found. progress: called with the number of images settled since its last call."""
    todo = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)][::-1]
    while todo:
        part = todo.pop()
        done = decoded(index, part, threads)
        progress(done)
        rest = part[done:]
        if len(rest) == 1:
            yield rest[0]
            progress(1)
        elif len(rest) > 1:
            first = BATCH if len(rest) > BATCH else len(rest) // 2
            todo += [rest[first:], rest[:first]]


def check(index: ImageIndex, *, deep: bool, threads: int) -> list[str]:
    """The broken files, by their relative paths, in the order of the index; prints them."""
    broken: set[str] = set()

    def report(name: str, wrong: str) -> None:
        broken.add(name)
        tqdm.write(f"{name} {wrong}", file=sys.stdout)

    with tqdm(total=len(index), unit="img", desc="bytes") as bar:
        for name, wrong in confirmed(index, faults(index, progress=bar.update)):
            report(name, wrong)
    if deep:
        ids = [i for i, name in enumerate(index.files) if name not in broken]
        with tqdm(total=len(ids), unit="img", desc="decode") as bar:
            for i in undecodable(index, ids, threads, bar.update):
                report(index.files[i], "does not decode")
    return [name for name in index.files if name in broken]


def folder(data: str, split: str | None) -> str:
    """The folder that holds one folder for each class."""
    return train_folder(data) if split is None else os.path.join(data, split)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = parser_of(__doc__, prog=prog)
    add_data(parser, type=str, required=True, help="folder of the data set")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--split", metavar="NAME", help="folder in DIR whose images are checked; default: train"
    )
    which.add_argument(
        "--list",
        metavar="FILE",
        help="text file of the images to check, instead of a folder; each line is a path relative "
        "to --data, a space and the number of the class",
    )
    parser.add_argument(
        "--format",
        choices=["folder", *ARCHIVES],
        default="folder",
        help="what --data holds: folders of images, tars (webdataset) or TFRecord files; default: "
        "%(default)s",
    )
    add_archives(parser)
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE",
        help="write the paths of broken images to FILE, one a line",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every image; without it, only those that look broken",
    )
    parser.add_argument(
        "--threads", type=count, default=4, help="CPU threads that decode; default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        check_format(arguments)
        if arguments.format in ARCHIVES:
            index = open_archives(arguments)
        elif arguments.list is not None:
            index = ImageIndex.from_list(arguments.list, root=arguments.data)
        else:
            index = ImageIndex(folder(arguments.data, arguments.split), allow_empty=True)
        broken = check(index, deep=arguments.decode, threads=arguments.threads)
        if arguments.out:
            broken_lines = [name for name in broken if len(name.splitlines()) > 1]
            with open(arguments.out, "w", encoding="utf-8") as file:
                file.writelines(f"{name}\n" for name in broken if name not in broken_lines)
            if broken_lines:
                raise ValueError(
                    f"{len(broken_lines)} broken images have names of several lines, which a list "
                    f"cannot hold: rename or remove {broken_lines[0]!r} and its like; all others "
                    f"are in '{arguments.out}'"
                )
    except (DatasetError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    where = f"; listed in {arguments.out}" if arguments.out else ""
    print(f"{len(broken)} of {len(index)} images are broken{where}")
    return 1 if broken else 0
