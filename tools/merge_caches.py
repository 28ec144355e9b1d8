"""Join saliency caches of parts of a data set, or of the same one with different images done.

The same as `scae-dali merge-caches`.
"""

import sys

from scae_dali.commands.main import script


def main() -> int | str | None:
    return script("merge-caches")


if __name__ == "__main__":
    sys.exit(main())
