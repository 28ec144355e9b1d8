"""Join saliency caches of parts of a data set, or of the same one with different images done.

The same as `scae-dali merge-caches`.
"""

from scae_dali.commands.merge_caches import main

if __name__ == "__main__":
    main()
