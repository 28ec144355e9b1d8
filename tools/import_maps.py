"""Put maps of your own into a saliency cache.

The same as `scae-dali import-maps`.
"""

import sys

from scae_dali.commands.main import script


def main() -> int | str | None:
    return script("import-maps")


if __name__ == "__main__":
    sys.exit(main())
