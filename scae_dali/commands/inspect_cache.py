"""Show what a saliency cache holds: how its maps were made, how many there are, and their age."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scae_dali.cache.cache import CacheError, SaliencyCache
from scae_dali.commands.options import parser_of


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


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = parser_of(__doc__, prog=prog)
    parser.add_argument("cache", metavar="CACHE", help="folder of the cache, such as imagenet.lmdb")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    args = parser.parse_args(argv)
    try:
        with SaliencyCache(args.cache) as cache:
            facts = summary(cache)
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=2) if args.json else text(facts))
    return 0
