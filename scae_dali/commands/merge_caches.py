"""Join saliency caches of parts of a data set, or of the same one with different images done.

    scae-dali merge-caches one.lmdb two.lmdb --out all.lmdb
    scae-dali merge-caches part0.lmdb part1.lmdb --out all.lmdb --data /data/imagenet \\
        --shards part0.txt part1.txt

The first command joins caches of one data set. The second joins caches that were built with
--list part0.txt and --list part1.txt. All must be made in the same way, by the same network. Where
maps are still missing, build-cache with the options of the parts goes on with them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from scae_dali.cache import SaliencyCache, merge_caches
from scae_dali.commands.images import open_images
from scae_dali.commands.options import add_images, need_data, parser_of
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import index_of


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, prog=prog)
    parser.add_argument("caches", metavar="CACHE", nargs="+", help="folders of the caches")
    parser.add_argument(
        "--out", required=True, help="folder of the merged cache, which must not exist"
    )
    add_images(parser, required=False)
    parser.add_argument(
        "--shards",
        metavar="FILE",
        nargs="+",
        help="for each cache, in their order, the --list that it was built with; --data, --format "
        "and --list then name all images. Without it all caches are of the same images, and --data "
        "is needed only where they were built with --naming path",
    )
    parser.add_argument(
        "--keep-first",
        action="store_true",
        help="where caches have different maps of one image, take that of the cache named first; "
        "without it this is an error",
    )
    arguments = parser.parse_args(argv)
    if arguments.shards is not None:
        if arguments.data is None:
            parser.error("--shards needs --data, the folder of all images")
        if len(arguments.shards) != len(arguments.caches):
            parser.error(
                f"--shards must be a list for each of the {len(arguments.caches)} caches, got "
                f"{len(arguments.shards)}"
            )
    need_data(parser, arguments)
    return arguments


def merge(arguments: argparse.Namespace) -> None:
    index = None if arguments.data is None else index_of(open_images(arguments))
    shards = None
    if arguments.shards is not None:
        shards = [ImageIndex.from_list(one, root=arguments.data) for one in arguments.shards]
    with ExitStack() as stack:
        caches = [
            stack.enter_context(SaliencyCache(path, index=index if shards is None else shards[k]))
            for k, path in enumerate(arguments.caches)
        ]
        done = merge_caches(
            arguments.out, caches, index=index, shards=shards, keep_first=arguments.keep_first
        )
    print(f"{arguments.out}: {done.found} maps of {done.samples} images")
    if len(done.conflicts):
        print(
            f"images of which the caches had different maps, and the first was kept: "
            f"{len(done.conflicts)} (the first: image {done.conflicts[0]})",
            file=sys.stderr,
        )
    if not done.neighbors:
        print(
            "it has no neighbouring classes: the caches have none, or different ones; build-cache "
            "stores them",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    arguments = parse(argv, prog)
    try:
        merge(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
