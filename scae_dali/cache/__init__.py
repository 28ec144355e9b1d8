"""The saliency cache: an LMDB environment that holds a small map for every sample of a data set."""
