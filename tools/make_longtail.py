"""List a long-tailed subset of any folder of classes, with CIFAR-100-LT's exponential profile.

    python tools/make_longtail.py --data /data/cifar100 --split train --imbalance 100 --out lt.txt
    python train.py --data.root /data/cifar100 --data.train_list lt.txt --data.val_dir test …

Class 0, the first by name, is the head. The list holds the samples that --data.imbalance takes
from the folder, in a form that other programs read too.
"""

import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from scae_dali.commands.program import run_program
from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.data.longtail import imbalanced
from scae_dali.training.evaluation import FEW, MANY, shots
from tools.common.options import add_data, parser_of

ROWS, BAR = 20, 50  # of the histogram: lines, and columns of the longest


def write_list(path: Path, index: ImageIndex, prefix: str) -> None:
    """`path label` lines, all of them or none."""
    names = [f"{prefix}{name}" for name in index.files]
    if odd := [name for name in names if name.splitlines() != [name]]:
        raise DatasetError(f"{odd[0]!r} has a line break, which no list can hold; rename it")
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as out:
            out.writelines(f"{n} {k}\n" for n, k in zip(names, index.labels.tolist(), strict=True))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe(counts: np.ndarray) -> Iterator[str]:
    """The profile in lines. counts: int64 [K], positive."""
    total = counts.sum()
    yield f"{len(counts)} classes, {total} images; a class has {counts.max()} … {counts.min()}"
    bounds = {"many": f"> {MANY}", "medium": f"{FEW}-{MANY}", "few": f"< {FEW}"}
    for name, these in shots(counts).items():
        share = counts[these].sum() / total
        label = f"{name}, {bounds[name]}"
        yield f"  {label:15s}{these.sum():5d} classes, {share:6.1%} of the images"
    for ids in np.array_split(np.arange(len(counts)), min(ROWS, len(counts))):
        mean = counts[ids].mean()
        bar = "█" * max(1, round(BAR * mean / counts.max()))
        yield f"{ids[0]:6d} - {ids[-1]:<5d}{mean:8.1f} {bar}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    add_data(parser, type=str, required=True, help="folder of the data set")
    parser.add_argument(
        "--split",
        default="",
        metavar="NAME",
        help="folder in DIR that holds the folders of the classes, such as train; default: DIR "
        "itself",
    )
    parser.add_argument(
        "--imbalance",
        required=True,
        type=float,
        help="number of images of the largest class, divided by that of the smallest",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of images; default: %(default)s"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="text file to write; each line is a path relative to --data, a space and the number "
        "of the class",
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE if it exists")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out.exists() and not arguments.force:
            raise DatasetError(f"--out {arguments.out} exists; give --force to overwrite it")
        index = ImageIndex(os.path.join(arguments.data, arguments.split))
        ids = imbalanced(index.labels, index.num_classes, arguments.imbalance, seed=arguments.seed)
        subset = index.subset(np.sort(ids))
        prefix = arguments.split.rstrip("/") + "/" if arguments.split else ""
        write_list(arguments.out, subset, prefix)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(describe(subset.class_counts)))
    print(f"listed in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
