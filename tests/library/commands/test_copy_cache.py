"""scae-dali copy-cache."""

import numpy as np
from conftest import run

from scae_dali.cache import SaliencyCache


def test_a_copy(cache, index, tmp_path):
    said = run("copy_cache", cache.path, "--out", tmp_path / "copy.lmdb")
    assert f"{tmp_path}/copy.lmdb: 50 maps, 0.0 MB" in said
    with SaliencyCache(tmp_path / "copy.lmdb", index=index) as copy:
        assert copy.meta == cache.meta
        np.testing.assert_array_equal(copy.snapshot().maps, cache.snapshot().maps)
    said = run("copy_cache", cache.path, "--out", tmp_path / "copy.lmdb", status=1)
    assert "copy.lmdb' already; choose another path" in said
    said = run("copy_cache", tmp_path / "none", "--out", tmp_path / "copy", status=1)
    assert "error: no saliency cache at" in said
