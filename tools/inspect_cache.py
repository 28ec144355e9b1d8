"""Show what a saliency cache holds: how its maps were made, how many there are, and their age.

The same as `scae-dali inspect-cache`.
"""

import sys

from scae_dali.commands.inspect_cache import main

if __name__ == "__main__":
    sys.exit(main())
