"""Copy a saliency cache, also while another process writes to it.

The same as `scae-dali copy-cache`.
"""

import sys

from scae_dali.commands.main import script


def main() -> int | str | None:
    return script("copy-cache")


if __name__ == "__main__":
    sys.exit(main())
