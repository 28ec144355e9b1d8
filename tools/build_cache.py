"""Build a saliency cache offline, from a trained network.

The same as `scae-dali build-cache`.
"""

import sys

from scae_dali.commands.main import script


def main() -> int | str | None:
    return script("build-cache")


if __name__ == "__main__":
    sys.exit(main())
