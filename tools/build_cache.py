"""Build a saliency cache offline, from a trained network.

The same as `scae-dali build-cache`.
"""

from scae_dali.commands.build_cache import main

if __name__ == "__main__":
    main()
