"""Draw a sheet of images with their saliency maps and with what the pipeline erases.

The same as `scae-dali show-erasing`.
"""

from scae_dali.commands.show_erasing import main

if __name__ == "__main__":
    main()
