"""The benchmarks of growth: what they find at small sizes, and that their checks can fail."""

import json
import mmap
from concurrent.futures.process import BrokenProcessPool

import lmdb
import numpy as np
import pytest
from conftest import run
from PIL import Image

from tools.benchmarks import cache, growth, scale
from tools.common import memory


def test_a_map_tells_its_sample_and_epoch():
    ids = np.array([0, 1, 255, 256, 70_000, 99_999_999])
    maps = growth.maps_of(ids, 300)
    assert (maps.dtype, maps.shape) == (np.uint8, (6, 7, 7))
    assert growth.salts(ids, maps).tolist() == [300 % 256] * 6
    assert len({one.tobytes() for one in maps}) == 6
    assert (growth.maps_of(ids, 301) != maps).all()


def test_a_reader_finds_torn_strange_and_missing_maps(monkeypatch):
    cache.check_the_check()
    ids = np.arange(5)
    maps = growth.maps_of(ids, 1)
    maps[1, 6, 6] = growth.maps_of(ids, 2)[1, 6, 6]  # torn in the last byte
    maps[2] = maps[3]
    seen = cache.Seen()
    seen.add(ids, maps, np.array([True, True, True, True, False]))
    assert seen == cache.Seen(maps=5, torn=2, missing=1, epochs=frozenset({1}))
    monkeypatch.setattr(cache, "salts", lambda ids, maps: np.ones(len(ids), np.int64))
    with pytest.raises(RuntimeError, match="the check for torn maps does not work"):
        cache.check_the_check()


def test_readers_beside_a_writer_that_tears(tmp_path, monkeypatch):
    """A torn map in the file itself makes the whole benchmark fail."""
    n = 64
    path = tmp_path / "maps.lmdb"
    torn = growth.maps_of(np.arange(n), 0)
    torn[9, 3:] += 1
    with cache.SaliencyCache.create(path, growth.SyntheticIndex(n), grid=(7, 7)) as made:
        made.begin_pass(0)
        made.write(np.arange(n), torn, epoch=0)
        made.end_pass(0)
    found = cache.together(str(path), 1, False, n, 0.1)
    assert found["torn"] > 0
    assert found["missing"] == 0


def test_what_smaller_sizes_told_outlives_a_killed_process(tmp_path, monkeypatch, capsys):
    def alone(work, n, *rest):
        if n == 20:
            raise BrokenProcessPool
        return {"samples": n, "index": "ImageIndex", "cache_bytes": n, "steps": {}}

    out = tmp_path / "bench.json"
    argv = ["--parts", "sizes", "--samples", "10,20,30", "--json", str(out)]
    monkeypatch.setattr(scale, "alone", alone)
    with pytest.raises(SystemExit, match="the process of 20 samples was killed"):
        scale.main(argv)
    assert [one["samples"] for one in json.loads(out.read_text())["sizes"]] == [10]


def test_bench_cache(tmp_path):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    sizes = ["--records", "3e3,6000", "--batches", 8, "--batch", 32, "--rounds", 1]
    together = ["--processes", "1,2", "--seconds", 0.3]
    run("benchmark", "cache", *sizes, *together, "--json", out, "--plot", plot)
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"][::7]] == ["LMDB get, 3,000", "LMDB get, 6,000"]
    assert len(result["rows"]) == 14
    assert [one["records"] for one in result["sizes"]] == [3000, 6000]
    for one in result["sizes"]:
        cold = one["cold"]
        assert cold["cold"] == (cold["cold_kept"]["median"] < 0.01)
        assert min(cold["cold_lookups_per_s"]["median"], cold["warm_open_s"]["median"]) > 0
        processes = one["processes"]
        assert [process["readers"] for process in processes] == [1, 2]
        for process in processes:
            assert (process["torn"], process["missing"]) == (0, 0)
            assert process["checked"] > 0
            assert [row["name"] for row in process["lookups"]] == ["alone", "beside a writer"]
            assert [len(row["rates"]) for row in process["lookups"]] == [1, 1]
            assert process["written_per_s"]["median"] > 0
            assert len(process["epochs_seen"]) > 1  # they did meet a writer
    with Image.open(plot) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (56, 56), (112, 112)])
def test_lmdb_has_room_for_maps_of_all_sizes(tmp_path, grid):
    with lmdb.open(str(tmp_path), map_size=cache.map_size(900, grid)) as env:
        for append in (True, False, False):
            cache.plain_pass(env, 900, grid, append)


def test_bench_scale(tmp_path):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    options = [
        "--samples",
        "2000,4000",
        "--epoch",
        3000,
        "--files",
        1500,
        "--batch",
        64,
        "--lookups",
        999,
    ]
    text = run("benchmark", "scale", *options, "--rounds", 1, "--json", out, "--plot", plot)
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == list(result["epoch"])
    for epoch in result["epoch"].values():
        assert (epoch["samples"], epoch["batches"]) == (3000, 47)
        assert epoch["no_map"] == 0
        assert 0.4 < epoch["erased"] < 0.6
        assert set(epoch["own_bytes"]) == {"begin", "middle", "end"}
    started = result["startup"]
    assert (started["files"], started["folders"]) == (1500, 1000)
    assert "training pipeline, built" in started["seconds"]
    assert min(value["median"] for value in started["seconds"].values()) > 0
    assert [(one["samples"], one["index"]) for one in result["sizes"]] == [
        (2000, "ImageIndex"),
        (4000, "ImageIndex"),
    ]
    for one in result["sizes"]:
        assert set(one["steps"]) >= {"index", "first pass", "lookups", "order of an epoch", "plans"}
        assert not [step for step in one["steps"].values() if "left_out" in step]
    assert len(result["breaks_first"]) == 3
    assert "4,000 samples, index: ImageIndex" in text
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_names_that_do_not_fit_leave_the_other_steps(tmp_path):
    known = {"names": 1e9, "load the resident copy": 1e9}
    found = scale.alone(scale.at_size, 2000, 64, 999, str(tmp_path), known, 10**10)
    assert found["index"] == "synthetic"
    steps = found["steps"]
    assert "it would need 20" in steps["names"]["left_out"]
    assert "of 10.0 GB that it may have" in steps["names"]["left_out"]
    assert "left_out" in steps["load the resident copy"]
    assert "index" not in steps
    assert "lookups in the copy" not in steps
    assert steps["plans"]["seconds"] > 0


def beyond_the_limit(limit: int) -> dict:
    memory.limit(limit)
    steps = scale.Steps(10, {}, limit)
    assert steps.take("too much", lambda: np.ones(limit)) is None
    assert steps.take("little", lambda: np.ones(10)) is not None
    return steps.found


def test_a_step_without_memory_is_left_out():
    found = scale.alone(beyond_the_limit, 2 << 30)
    assert found["too much"] == {"left_out": "MemoryError of 2.1 GB that it may have"}
    assert found["little"]["seconds"] < 1


def test_memory_is_watched():
    def taken(size):  # straight from the kernel: malloc may have kept what others gave back
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(pages, np.uint8)[:] = 1
        return pages

    with memory.Watch() as watch:
        before = watch.peak
        taken(50 << 20).close()
        big = taken(200 << 20)
        held = memory.usage()["own"] - before
        big.close()
    assert held == pytest.approx(200 << 20, rel=0.1)
    assert watch.peak - before == pytest.approx(200 << 20, rel=0.35)
    assert memory.usage()["own"] - before < 20 << 20


def test_pages_of_a_file_are_dropped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert memory.resident_share(path) == 1
    kept = memory.drop_pages(path)
    assert kept == memory.resident_share(path)  # 0 but on a file system in memory


def test_what_is_asked_for_is_checked():
    assert "--records: must be numbers" in run("benchmark", "cache", "--records", "0", status=2)
    assert "at least two a round, got 3" in run("benchmark", "cache", "--batches", 3, status=2)
    assert "epoch, sizes, startup, got 'x'" in run("benchmark", "scale", "--parts", "x", status=2)
    message = run("benchmark", "scale", "--epoch", 100, "--batch", 64, status=2)
    assert "more than 20 batches of 64, got 100" in message
