"""Write the maps of a saliency cache to one .npy file, with the names of their images.

The same as `scae-dali export-maps`.
"""

import sys

from scae_dali.commands.main import script


def main() -> int | str | None:
    return script("export-maps")


if __name__ == "__main__":
    sys.exit(main())
