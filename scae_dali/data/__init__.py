"""Data sets: the index of images, long-tailed subsets, images in memory, and broken files."""
