"""A stage whose cache cannot guide it: found out when it is made.

A cache that was built in part, or not at all, guided nothing, and nobody was told; a run that was
longer than a map's stamp of 16 bits ended at its first pass beyond. Found by trying.
"""

import numpy as np
import pytest

from scae_dali import SCAE, SaliencyCache, Stage
from scae_dali.data.index import ImageIndex


@pytest.fixture
def part(index, tmp_path):
    """A cache with maps of 20 of 50 samples, closed."""
    cache = SaliencyCache.create(tmp_path / "part.lmdb", index, grid=(7, 7))
    cache.begin_pass(1, ids=np.arange(20))
    cache.write(np.arange(20), np.random.default_rng(0).random((20, 7, 7)), epoch=1)
    cache.end_pass(1)
    cache.close()
    return cache.path


@pytest.mark.parametrize("method", ["scae", "keep_augment", "rand_augment+scae"])
def test_a_cache_that_lacks_maps_is_told(index, part, method):
    with pytest.warns(RuntimeWarning, match="has maps of 20 of 50 samples; the others are eras"):
        Stage(index, method, cache=part, epochs=2, batch_size=8, seed=1)


def test_what_is_not_guided_or_complete_is_quiet(index, cache, part):
    Stage(index, "cutout", cache=part, epochs=2, batch_size=8, seed=1)
    SCAE(index, cache.path, epochs=2, batch_size=8, seed=1)
    SCAE(index, SaliencyCache(part, index=index), epochs=2, batch_size=8, seed=1)


def test_a_cache_without_maps_is_refused_where_nothing_fills_it(index, tmp_path):
    SaliencyCache.create(tmp_path / "empty.lmdb", index, grid=(7, 7)).close()
    keywords = {"epochs": 2, "batch_size": 8, "seed": 1}
    with pytest.raises(ValueError, match="has no maps, and gets none with refresh_every=0: buil"):
        SCAE(index, tmp_path / "empty.lmdb", refresh_every=0, **keywords)
    SCAE(index, tmp_path / "empty.lmdb", **keywords)


def test_more_epochs_than_a_map_can_carry_are_refused(index, cache):
    with pytest.raises(ValueError, match="epochs must be at most 65540 with refresh_every=10, g"):
        SCAE(index, cache, epochs=80_000, batch_size=8, seed=1)
    SCAE(index, cache, epochs=80_000, batch_size=8, seed=1, refresh_every=0)  # the remedy
    Stage(index, "cutout", epochs=80_000, batch_size=8, seed=1)


def test_more_classes_than_their_neighbours_have_numbers_are_refused(tmp_path):
    labels = np.concatenate([np.zeros(20, int), np.arange(66_000)])
    index = ImageIndex.from_arrays([f"{i}.jpg" for i in range(len(labels))], labels,
                                   num_classes=66_000)  # fmt: skip
    cache = SaliencyCache.create(tmp_path / "many.lmdb", index, grid=(2, 2))
    keywords = {"epochs": 2, "batch_size": 8, "seed": 1}
    with pytest.raises(ValueError, match="neighbors must be 0 where there are more than 65,536"):
        SCAE(index, cache, **keywords)
    SCAE(index, cache, neighbors=0, **keywords)  # the remedy
