"""Copy a saliency cache, also while another process writes to it.

The same as `scae-dali copy-cache`.
"""

from scae_dali.commands.copy_cache import main

if __name__ == "__main__":
    main()
