"""Show what a saliency cache holds: how its maps were made, how many there are, and their age.

    scae-dali inspect-cache imagenet.lmdb
    scae-dali inspect-cache imagenet.lmdb --data /data/imagenet --picture maps.png

The picture has the mean map of the most frequent classes, and the maps that are most and least
focused beside their images. All maps are read once, and memory does not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from scae_dali.cache.cache import SaliencyCache
from scae_dali.checks import check_dali
from scae_dali.commands.options import (
    add_cache,
    add_images,
    count,
    need_data,
    parser_of,
    picture_file,
)
from scae_dali.data.index import ImageIndex

CLASSES = 23  # that the picture shows


def summary(cache: SaliencyCache) -> dict[str, Any]:
    """The facts of a cache, by name. found: samples that have a map; flat: maps that are the same
    everywhere; malformed: records withdrawn or of a wrong length; ages: number of maps by stamp."""
    meta = cache.meta
    ages, malformed = cache.census()
    found = sum(ages.values())
    return {
        "path": cache.path,
        "meta": asdict(meta),
        "samples": meta.samples,
        "found": found,
        "coverage": found / meta.samples if meta.samples else 0.0,
        "flat": cache.coverage().flat,
        "malformed": malformed,
        "ages": {str(epoch): count for epoch, count in ages.items()},
        "bytes": cache.size_bytes,
    }


def text(facts: dict[str, Any]) -> str:
    """The `summary` as lines to read."""
    lines = [facts["path"]]
    lines += [
        f"  {name:12} {'-' if value in (None, '') else value}"
        for name, value in facts["meta"].items()
    ]
    lines += [
        f"maps          {facts['found']:,} of {facts['samples']:,} ({facts['coverage']:.2%})",
        f"flat          {facts['flat']:,} (the same everywhere, so they guide nothing)",
        f"malformed     {facts['malformed']:,} (withdrawn or of the wrong length)",
        f"data file     {facts['bytes'] / 1e6:.1f} MB",
    ]
    if 2 * facts["flat"] > facts["found"]:
        lines.append(
            "warning: more than half of the maps are flat; look at the layer and the weights that "
            "they were made with"
        )
    if facts["ages"]:
        lines.append("epoch         maps")
        most = max(facts["ages"].values())
        for epoch, count in facts["ages"].items():
            lines.append(f"  {epoch:>5} {count:12,}  {'#' * max(round(40 * count / most), 1)}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, prog=prog)
    add_cache(parser)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--picture", type=picture_file, metavar="FILE.png", help="draw a picture of the maps"
    )
    parser.add_argument(
        "--classes",
        type=count,
        metavar="N",
        help=f"how many classes the picture shows, the most frequent ones; default: {CLASSES}",
    )
    add_images(parser, required=False)
    arguments = parser.parse_args(argv)
    need_data(parser, arguments)
    for option in ("data", "classes"):
        if getattr(arguments, option) is not None and arguments.picture is None:
            parser.error(f"--{option} is for the picture; give --picture FILE.png too")
    return arguments


def draw(arguments: argparse.Namespace) -> None:
    """Write the picture, with images and classes where --data tells them."""
    from scae_dali.commands.cache_picture import Look, image_file, save_picture

    index: ImageIndex | None = None
    look: Look | None = None
    if arguments.data is not None:
        check_dali()
        from scae_dali.commands.images import open_images
        from scae_dali.data.pixels import index_of

        images = open_images(arguments)
        index = index_of(images)
        if isinstance(images, ImageIndex):
            look = partial(image_file, images)
        else:
            look = images.pixels.__getitem__
    with SaliencyCache(arguments.cache, index=index) as cache:
        save_picture(arguments.picture, cache, index, look, classes=arguments.classes or CLASSES)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse(argv, prog)
    try:
        with SaliencyCache(arguments.cache) as cache:
            facts = summary(cache)
        print(json.dumps(facts, indent=2) if arguments.json else text(facts))
        if arguments.picture is not None:
            draw(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
