"""The saliency cache: an LMDB environment that holds a small map for every sample of a data set."""

from scae_dali.cache.cache import SaliencyCache
from scae_dali.cache.format import CacheError, CacheMeta
from scae_dali.cache.reader import ResidentCache
from scae_dali.cache.writer import ChunkWriter

__all__ = ["CacheError", "CacheMeta", "ChunkWriter", "ResidentCache", "SaliencyCache"]
