"""The saliency cache: an LMDB environment that holds a small map for every sample of a data set."""

from scae_dali.cache.cache import SaliencyCache
from scae_dali.cache.exports import export_maps
from scae_dali.cache.format import CacheError, CacheMeta
from scae_dali.cache.imports import import_maps
from scae_dali.cache.merging import merge_caches
from scae_dali.cache.reader import ResidentCache
from scae_dali.cache.writer import ChunkWriter

__all__ = [
    "CacheError",
    "CacheMeta",
    "ChunkWriter",
    "ResidentCache",
    "SaliencyCache",
    "export_maps",
    "import_maps",
    "merge_caches",
]
