"""Put maps of your own into a saliency cache.

The same as `scae-dali import-maps`.
"""

from scae_dali.commands.import_maps import main

if __name__ == "__main__":
    main()
