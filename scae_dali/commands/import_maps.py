"""Put maps of your own into a saliency cache.

    scae-dali import-maps masks --data /data/imagenet --grid 7,7 --out maps.lmdb
    scae-dali import-maps maps.npy --data /data/imagenet --grid 7,7 --out maps.lmdb

masks holds a file class/name.npy or class/name.png for each image class/name.jpg: float in [0, 1],
or grey in 1, 8 or 16 bits. maps.npy is one array [N, h, w] in the order of the images. Maps cover
the whole upright image and may be of any size: a cell of the cache is the mean of the area that it
covers, and where a map is coarser than the grid it is interpolated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from scae_dali.cache import SaliencyCache, import_maps
from scae_dali.cache.resample import SCALES
from scae_dali.commands.images import open_images
from scae_dali.commands.options import add_images, grid, parser_of
from scae_dali.data.pixels import index_of


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, prog=prog)
    parser.add_argument(
        "maps",
        metavar="MAPS",
        help="folder of .npy files and grey PNG files that mirrors the folder of the images, or "
        "one .npy file [N, h, w]",
    )
    add_images(parser, required=True)
    parser.add_argument(
        "--out", required=True, help="folder of the cache, which is made if it does not exist"
    )
    parser.add_argument(
        "--grid",
        type=grid,
        metavar="H,W",
        help="cells of a map in a cache that is made, such as 7,7",
    )
    parser.add_argument(
        "--names",
        metavar="FILE",
        help="text file with a line for each row of the .npy file: the name of its image, as "
        "export-maps writes them; without it the rows are in the order of the images",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="none",
        help="none: values are taken as they are, and floats must be in [0, 1]; max: each map is "
        "divided by its highest cell; default: %(default)s",
    )
    parser.add_argument(
        "--naming",
        choices=["index", "path"],
        help="what a map is found by, as for build-cache; default: that of the cache, index in a "
        "new one",
    )
    parser.add_argument(
        "--model", help="what made the maps, in a word; it is recorded in the cache"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    arguments = parse(argv, prog)
    try:
        index = index_of(open_images(arguments))
        names = None
        if arguments.names is not None:
            names = Path(arguments.names).read_text("utf-8").removesuffix("\n").split("\n")
        with tqdm(unit="map", desc="read") as bar:
            done = import_maps(
                arguments.out,
                index,
                arguments.maps,
                grid=arguments.grid,
                names=names,
                scale=arguments.scale,
                naming=arguments.naming,
                model=arguments.model,
                progress=bar.update,
            )
        with SaliencyCache(arguments.out, index=index) as cache:
            found, flat = cache.coverage()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{arguments.out}: {len(done.ids)} maps imported, {found} of {len(index)} images have one; "
        f"{flat} of {found} maps are flat"
    )
    if len(done.missing):
        print(
            f"{len(done.missing)} of {len(index)} images got no map here (the first: "
            f"{index.files[done.missing[0]]})",
            file=sys.stderr,
        )
    if done.unused:
        print(
            f"left out: {len(done.unused)}, maps of no image (the first: {done.unused[0]})",
            file=sys.stderr,
        )
    if done.highest <= 1:
        print(
            f"warning: no value is above {done.highest} of 255; are these masks of 0 and 1? "
            "--scale max makes the highest cell of each map 1",
            file=sys.stderr,
        )
