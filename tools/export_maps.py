"""Write the maps of a saliency cache to one .npy file, with the names of their images.

The same as `scae-dali export-maps`.
"""

from scae_dali.commands.export_maps import main

if __name__ == "__main__":
    main()
