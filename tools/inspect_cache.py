"""Show what a saliency cache holds.

python tools/inspect_cache.py imagenet.lmdb
python tools/inspect_cache.py imagenet.lmdb --json
"""

import sys

from scae_dali.commands.inspect_cache import main

if __name__ == "__main__":
    sys.exit(main())
