"""scae-dali merge-caches: of parts that build-cache made, and what goes on after it."""

import numpy as np
import pytest
from conftest import run, write_pngs

from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex


@pytest.fixture
def data(tmp_path):
    write_pngs(tmp_path / "data" / "train", {"a": 5, "b": 4}, (32, 32))
    return tmp_path / "data"


@pytest.mark.parametrize("naming", ["index", "path"])
def test_parts_by_lists_and_what_is_missing_is_made(data, build, tmp_path, capsys, naming):
    index = ImageIndex(data / "train")
    options = {"data": data, "model": "cifar_resnet20", "naming": naming, "batch_size": 2}
    build(**options, out=tmp_path / "whole.lmdb")
    parts = []
    for k, ids in enumerate(([0, 5, 8], [6, 1, 2])):
        lines = [f"train/{index.files[i]} {index.labels[i]}\n" for i in ids]
        (tmp_path / f"{k}.txt").write_text("".join(lines))
        build(**options, out=tmp_path / f"{k}.lmdb", list=tmp_path / f"{k}.txt")
        parts.append(tmp_path / f"{k}.lmdb")
    out, lists = tmp_path / "all.lmdb", [tmp_path / "0.txt", tmp_path / "1.txt"]
    said = run("merge_caches", *parts, "--out", out, "--data", data, "--shards", *lists)
    assert f"{out}: 6 maps of 9 images" in said
    capsys.readouterr()
    build(**options, out=out)
    assert f"{out}: 3 maps of 9 in" in capsys.readouterr().out
    with (
        SaliencyCache(out, index=index) as merged,
        SaliencyCache(tmp_path / "whole.lmdb", index=index) as whole,
    ):
        assert merged.meta == whole.meta
        assert np.abs(merged.snapshot().maps.astype(int) - whole.snapshot().maps).max() <= 1
        np.testing.assert_array_equal(merged.read_neighbors(), whole.read_neighbors())


def test_parts_of_one_data_set_need_no_data(data, build, tmp_path):
    index = ImageIndex(data / "train")
    build(data=data, model="cifar_resnet20", out=tmp_path / "whole.lmdb")
    with SaliencyCache(tmp_path / "whole.lmdb", index=index) as cache:
        meta, maps = cache.meta, cache.snapshot().maps
    made = {"weights": meta.weights, "model": meta.model, "layer": meta.layer}
    made |= {"input_size": meta.input_size, "settings": meta.settings}
    for k, ids in enumerate(([0, 1, 2, 3, 4], [4, 5, 6, 7, 8])):
        cache = SaliencyCache.create(tmp_path / f"{k}.lmdb", index, grid=meta.grid)
        cache.begin_pass(0, **made)
        cache.write(ids, maps[ids] if k == 0 else 255 - maps[ids], epoch=0)
        cache.close()
    parts = [tmp_path / "0.lmdb", tmp_path / "1.lmdb"]
    said = run("merge_caches", *parts, "--out", tmp_path / "all.lmdb", status=1)
    assert "has other maps than a cache before it; samples: 1 (the first: 4)" in said
    said = run("merge_caches", *parts, "--out", tmp_path / "all.lmdb", "--keep-first")
    assert "9 maps of 9 images" in said
    assert "different maps, and the first was kept: 1 (the first: image 4)" in said
    assert "it has no neighbouring classes" in said
    with SaliencyCache(tmp_path / "all.lmdb", index=index) as merged:
        np.testing.assert_array_equal(merged.snapshot().maps[:5], maps[:5])


def test_options_that_do_not_fit(data, tmp_path):
    said = run("merge_caches", "x", "--out", "y", "--shards", "z", status=2)
    assert "--shards needs --data, the folder of all images" in said
    for option in (["--exclude", "l.txt"], ["--format", "tfrecord"], ["--first-label", "0"]):
        said = run("merge_caches", "x", "--out", "y", *option, status=2)
        assert f"{option[0]} is about the images in --data; give --data DIR too" in said
    options = ["--out", "y", "--data", data, "--shards", "z"]
    said = run("merge_caches", "x", "w", *options, status=2)
    assert "--shards must be a list for each of the 2 caches, got 1" in said
    said = run("merge_caches", tmp_path / "none.lmdb", "--out", tmp_path / "all", status=1)
    assert "error: no saliency cache at" in said
