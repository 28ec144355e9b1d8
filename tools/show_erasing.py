"""Draw a sheet of images with their saliency maps and with what the pipeline erases.

The same as `scae-dali show-erasing`.
"""

import sys

from scae_dali.commands.main import script


def main() -> int | str | None:
    return script("show-erasing")


if __name__ == "__main__":
    sys.exit(main())
