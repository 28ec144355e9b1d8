"""Show what a saliency cache holds: how its maps were made, how many there are, and their age.

The same as `scae-dali inspect-cache`.
"""

import sys

from scae_dali.commands.main import script


def main() -> int | str | None:
    return script("inspect-cache")


if __name__ == "__main__":
    sys.exit(main())
