"""Find the broken images of a data set before training does, and list them for train.py.

The same as `scae-dali check-images`.
"""

import sys

from scae_dali.commands.check_images import main

if __name__ == "__main__":
    sys.exit(main())
