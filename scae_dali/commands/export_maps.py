"""Write the maps of a saliency cache to one .npy file, with the names of their images.

    scae-dali export-maps imagenet.lmdb --data /data/imagenet --out maps.npy

maps.npy is uint8 [N, h, w], 255 standing for 1, in the order of the images. maps.txt has a line
for each of them: its name, and behind that a tab and `missing` where it has no map; its row of the
array is zeros then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scae_dali.cache import SaliencyCache, export_maps
from scae_dali.cache.exports import check_new, names_file
from scae_dali.commands.images import open_images
from scae_dali.commands.options import add_cache, add_images, output_file, parser_of
from scae_dali.data.pixels import index_of


def _maps_file(text: str) -> str:
    """A .npy file that can be written and is not there yet; nor are its names. It is known before
    the images are listed."""
    try:
        check_new(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return str(output_file(text))


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, prog=prog)
    add_cache(parser)
    add_images(parser, required=True)
    parser.add_argument(
        "--out",
        type=_maps_file,
        required=True,
        metavar="FILE.npy",
        help="file of the maps; the names of the images are written to FILE.txt",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    arguments = parse(argv, prog)
    try:
        index = index_of(open_images(arguments))
        with SaliencyCache(arguments.cache, index=index) as cache:
            height, width = cache.meta.grid
            missing = export_maps(cache, index, arguments.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{arguments.out}: uint8 [{len(index)}, {height}, {width}]; names: "
        f"{names_file(arguments.out)}"
    )
    if len(missing):
        print(
            f"{len(missing)} of {len(index)} images have no map (the first: "
            f"{index.files[missing[0]]}); their rows are zeros, and they are marked in "
            f"{names_file(arguments.out)}",
            file=sys.stderr,
        )
