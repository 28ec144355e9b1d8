"""Find the broken images of a data set before training does, and list them for train.py.

The same as `scae-dali check-images`.
"""

import sys

from scae_dali.commands.main import script


def main() -> int | str | None:
    return script("check-images")


if __name__ == "__main__":
    sys.exit(main())
