"""Copy a saliency cache, also while another process writes to it.

    scae-dali copy-cache imagenet.lmdb --out /backup/imagenet.lmdb

The copy holds what the cache held at one moment. It appears as a whole or not at all. To copy the
files by other means is safe only while nobody writes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from scae_dali.cache.cache import SaliencyCache
from scae_dali.commands.options import add_cache, parser_of


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = parser_of(__doc__, prog=prog)
    add_cache(parser)
    parser.add_argument("--out", required=True, help="folder of the copy, which must not exist")
    arguments = parser.parse_args(argv)
    try:
        with SaliencyCache(arguments.cache) as cache:
            cache.copy(arguments.out)
        with SaliencyCache(arguments.out) as copy:
            found, _ = copy.coverage()
            print(f"{arguments.out}: {found} maps, {copy.size_bytes / 1e6:.1f} MB")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
