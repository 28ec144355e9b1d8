"""Two writers on one saliency cache: none may end with maps of the other under its own name.

Two offline builds with other weights on one path, or two training runs on one cache, were told
apart by the epoch alone: the cache ended with maps of both, and said that it was complete. The kind
is that of https://github.com/emfdavid/insitubatch/pull/51, where two processes with one cache
folder read each other's chunks as their own data. What else the maps depend on was not told apart
either, as in https://github.com/brain-score/vision/issues/2503 (activations of another input size
were reused), and a cache that was deleted under its writer took the rest of its maps with it, as in
https://github.com/vorot93/libmdbx-rs/issues/36. Extra state of a module was not expected among its
weights, as in https://github.com/huggingface/accelerate/issues/1246.
"""

import errno
import fcntl
import io
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from caches import GRID, FakeIndex, fill, in_process, maps_of
from conftest import weights_of, write_pngs
from passes import Here

from pipelines import maps as maps_module
from pipelines.config import ExecConfig
from pipelines.data import DataConfig
from pipelines.maps import Maps, path_of_node
from pipelines.recipe import Config, SaliencyConfig
from scae_dali.cache import CacheError, ChunkWriter, SaliencyCache
from scae_dali.cache import cache as cache_module
from scae_dali.cache.format import to_json
from scae_dali.data.index import ImageIndex
from scae_dali.saliency.weights import weights_digest
from scae_dali.training.networks import make_network

ALL = np.arange(100)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(cache_module, "PATIENCE", 0.1)


@pytest.fixture
def path(tmp_path):
    SaliencyCache.create(tmp_path / "maps.lmdb", FakeIndex(), grid=GRID).close()
    return str(tmp_path / "maps.lmdb")


@pytest.fixture
def pair(path):
    """Two objects of one cache."""
    with SaliencyCache(path, index=FakeIndex()) as one, SaliencyCache(path) as other:
        yield one, other


@contextmanager
def another_process(path):
    """Stands for one that has claimed the cache: flock tells open files apart, not processes."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
    os.close(descriptor)


@pytest.mark.parametrize("epoch", [3, 4])
def test_whoever_was_overtaken_is_told_and_writes_nothing_more(pair, epoch):
    one, other = pair
    one.begin_pass(3, weights="aaaaaaaaaa", model="resnet18")
    one.write(ALL[:40], maps_of(ALL[:40], 1), epoch=3)
    other.begin_pass(epoch, weights="bbbbbbbbbb", model="resnet50")
    told = (
        rf"another pass \(epoch {epoch}, model resnet50, weights bbbbbbbb\) has been begun .* "
        r"since this one \(epoch 3, model resnet18, weights aaaaaaaa\), .* another --out"
    )
    calls = [
        lambda: one.write(ALL, maps_of(ALL, 1), epoch=3),
        lambda: one.end_pass(3),
        lambda: one.write_neighbors(np.array([[1], [0]], np.uint16)),
    ]
    for call in calls:
        with pytest.raises(CacheError, match=told):
            call()
    other.write(ALL, maps_of(ALL, 2), epoch=epoch)
    other.end_pass(epoch)
    for call in calls:  # nor once the other is complete
        with pytest.raises(CacheError, match=told):
            call()
    np.testing.assert_array_equal(one.read(ALL)[0], maps_of(ALL, 2))
    assert one.read_neighbors() is None
    assert (one.meta.weights, one.meta.passes) == ("bbbbbbbbbb", 1)


def test_a_chunk_writer_tells_it_too(pair):
    one, other = pair

    def make():
        with ChunkWriter(one, 3, weights="aa", commit_every=10) as writer:
            writer.write(ALL[:10], maps_of(ALL[:10], 1))
            writer.flush()
            fill(other, 3, salt=2, weights="bb")
            for ids in np.split(ALL[10:], 9):
                writer.write(ids, maps_of(ids, 1))

    with pytest.raises(CacheError, match="of which nothing more was written"):
        make()
    np.testing.assert_array_equal(one.read(ALL)[0], maps_of(ALL, 2))


def test_of_two_with_the_same_weights_the_second_has_nothing_left_to_do(pair):
    one, other = pair
    one.begin_pass(3, weights="aa")
    assert len(other.begin_pass(3, weights="aa")) == 100
    fill(one, 3, salt=1, weights="aa")
    other.write(ALL, maps_of(ALL, 2), epoch=3)
    other.write_neighbors(np.array([[1], [0]], np.uint16))
    other.end_pass(3)
    np.testing.assert_array_equal(one.read(ALL)[0], maps_of(ALL, 1))
    assert one.meta.passes == 1


def test_unknown_weights_are_not_taken_for_the_same(pair):
    one, other = pair
    one.begin_pass(3)
    other.begin_pass(3)
    fill(one, 3)
    with pytest.raises(CacheError, match=r"another pass .* weights unknown\) has been begun"):
        other.write(ALL, maps_of(ALL), epoch=3)


def test_a_pass_of_the_same_epoch_is_nobodys_before_its_maps_are_withdrawn(pair, monkeypatch):
    """Where the first writes on while the second withdraws."""
    one, other = pair
    first = one.begin_pass(3, weights="aa")
    one.write(first[:30], maps_of(first[:30], 1), epoch=3)
    withdraw = other._withdraw

    def meanwhile(ids):
        withdraw(ids)
        with pytest.raises(CacheError, match="nothing more was written"):
            one.write(first[30:], maps_of(first[30:], 1), epoch=3)

    monkeypatch.setattr(other, "_withdraw", meanwhile)
    other.begin_pass(3, weights="bb")
    assert not one.read(ALL)[1].any()


def test_what_another_process_has_claimed_is_left_alone(path):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        fill(cache, 3, weights="aa")
    with SaliencyCache(path, index=FakeIndex()) as cache, another_process(path):
        before = cache.meta
        for call in (
            lambda: cache.begin_pass(3, weights="bb"),
            lambda: cache.begin_pass(4, weights="aa"),
            lambda: cache.claim(),
            lambda: cache.write_neighbors(np.array([[1], [0]], np.uint16)),
        ):
            with pytest.raises(
                CacheError, match=r"another process is writing to saliency cache '.*maps\.lmdb'; "
                r"wait until it has ended, or call close\(\) on the cache there, or take a cache"
            ):  # fmt: skip
                call()
        assert cache.meta == before
        assert cache.read(ALL)[1].all()  # who only reads needs no claim
        assert len(cache.begin_pass(3, weights="aa")) == 0  # nor who has nothing to write
        cache.end_pass(3)
    with SaliencyCache(path, index=FakeIndex()) as cache:
        fill(cache, 4, weights="bb")
        assert (cache.stamps() == 4).all()


@pytest.mark.parametrize(("weights", "joins"), [("aa", True), ("bb", False), ("", False)])
def test_the_same_maps_may_be_made_together(path, weights, joins):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        cache.begin_pass(3, weights=weights and "aa")
        cache.write(ALL[:40], maps_of(ALL[:40], 3), epoch=3)
    with SaliencyCache(path, index=FakeIndex()) as cache, another_process(path):
        if joins:
            fill(cache, 3, weights=weights)
            assert (cache.stamps() == 3).all()
        else:
            with pytest.raises(CacheError, match=r"another process is writing .* \(epoch 3, "):
                cache.begin_pass(3, weights=weights)
            assert cache.census() == ({3: 40}, 0)


def test_a_claim_waits_for_a_process_that_is_about_to_end(path, monkeypatch):
    monkeypatch.setattr(cache_module, "PATIENCE", 30)
    with SaliencyCache(path, index=FakeIndex()) as cache:
        with another_process(path):
            thread = threading.Thread(target=cache.claim)
            thread.start()
            time.sleep(0.1)
            assert thread.is_alive()
        thread.join(10)
        assert not thread.is_alive()


def test_a_claim_is_given_back_by_closing_and_made_anew_with_the_folder(path):
    cache = SaliencyCache(path)
    cache.claim()
    with pytest.raises(BlockingIOError), another_process(path):
        pass
    os.rename(path, path + ".old")
    again = SaliencyCache.create(path, FakeIndex(), grid=GRID)
    again.claim()
    with another_process(path + ".old"):
        pass
    again.close()
    cache.close()
    with another_process(path):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_written_to(path, monkeypatch, code):
    def no_locks(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with SaliencyCache(path, index=FakeIndex()) as cache:
        fill(cache, 3, weights="aa")
        assert (cache.stamps() == 3).all()


def test_a_claim_ends_with_its_process_though_a_fork_of_it_lives(path):
    done = in_process(
        """
        import scae_dali.cache.cache
        scae_dali.cache.cache.PATIENCE = 0.1
        cache = SaliencyCache(path, index=FakeIndex())
        cache.begin_pass(1, weights="aa")
        child = os.fork()
        if child == 0:
            mine = SaliencyCache(path, index=FakeIndex())
            try:
                mine.begin_pass(1, weights="bb")  # beside its parent's pass
            except CacheError as error:
                print(error, flush=True)
            for stream in (0, 1, 2):
                os.close(stream)
            time.sleep(60)
        print(child, flush=True)
        time.sleep(0.5)
        os.kill(os.getpid(), 9)
        """,
        path,
        check=False,
    )
    lines = done.stdout.splitlines()
    child = int(next(line for line in lines if line.isdecimal()))
    try:
        assert any("another process is writing" in line for line in lines), done
        with SaliencyCache(path, index=FakeIndex()) as cache:
            cache.claim()
        os.kill(child, 0)  # it does live
    finally:
        os.kill(child, signal.SIGKILL)


RACE = """
import scae_dali.cache.cache
scae_dali.cache.cache.PATIENCE = 0.3
weights = {weights!r}
cache = SaliencyCache(path, index=FakeIndex())
open(path + "." + {name!r}, "w").close()
while not all(os.path.exists(path + "." + name) for name in ("0", "1")):
    pass
with ChunkWriter(cache, 1, weights=weights, commit_every=10) as writer:
    for ids in np.split(writer.pending, range(10, len(writer.pending), 10)):
        writer.write(ids, maps_of(ids, ord(weights[0])))
        time.sleep(0.1)
print(cache.meta.weights)
"""


@pytest.mark.parametrize("weights", [("aa", "aa"), ("aa", "bb")])
def test_two_processes_that_begin_at_once(path, weights):
    done = [None, None]

    def run(number):
        code = RACE.format(weights=weights[number], name=str(number))
        done[number] = in_process(code, path, check=False)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = [one.returncode for one in done]
    with SaliencyCache(path, index=FakeIndex()) as cache:
        assert cache.meta.under_way is None
        made = cache.meta.weights
        np.testing.assert_array_equal(cache.read(ALL)[0], maps_of(ALL, ord(made[0])))
    if weights[0] == weights[1]:
        assert ended == [0, 0], done
    else:
        assert sorted(ended) == [0, 1]
        lost = done[ended.index(1)]
        assert "another process is writing to saliency cache" in lost.stderr
        assert done[ended.index(0)].stdout.split() == [made]


def test_an_offline_cache_is_not_replaced_by_one_of_other_weights(build, tmp_path, capsys):
    write_pngs(tmp_path / "data", {"a": 3, "b": 2}, (32, 32))
    out, index = tmp_path / "maps.lmdb", ImageIndex(tmp_path / "data")
    weights_of("cifar_resnet20", 2, tmp_path / "w.pt")
    options = {"data": tmp_path / "data", "model": "cifar_resnet20", "out": out}
    build(**options, weights=tmp_path / "w.pt")
    with SaliencyCache(out, index=index) as cache:
        meta, maps = cache.meta, cache.read(np.arange(5))[0]
    for more, told in (
        ({}, "weights [0-9a-f]{32}, not [0-9a-f]{32}"),
        ({"epoch": 7}, "weights [0-9a-f]{32}, not"),
        ({"weights": tmp_path / "w.pt", "layer": "layer2"}, "grid"),
        ({"weights": tmp_path / "w.pt", "layer": "layer3.2"}, "layer layer3, not layer3.2"),
        (
            {"weights": tmp_path / "w.pt", "mean": (1, 2, 3)},
            r"by --mean \[.*, not \[1.0, 2.0, 3.0]:",
        ),
        ({"weights": tmp_path / "w.pt", "std": (9, 9, 9)}, r"by --std \[.*, not \[9.0, 9.0, 9.0]:"),
        ({"weights": tmp_path / "w.pt", "amp": "bf16"}, "by --amp none, not bf16:"),
    ):
        with pytest.raises(SystemExit, match=rf"{told}.* a new cache at another (path|--out)"):
            build(**options | more)
        with SaliencyCache(out, index=index) as cache:
            assert cache.meta == meta
            np.testing.assert_array_equal(cache.read(np.arange(5))[0], maps)
    build(**options, weights=tmp_path / "w.pt")
    assert "is complete already: 5 maps" in capsys.readouterr().out
    with SaliencyCache(out, index=index) as cache:  # killed
        cache.begin_pass(0, weights="ab", ids=[0])
    with pytest.raises(SystemExit, match=r"delete it if it is of no use \(its pass never ended\)"):
        build(**options, weights=tmp_path / "w.pt")
    SaliencyCache(out).close()
    with another_process(out), pytest.raises(SystemExit, match="another process is writing to"):
        build(**options, weights=tmp_path / "w.pt")  # nobody is told to delete what is being made


class Nodes(Here):
    """The first processes of several nodes, each a thread."""

    def __init__(self, node, shared):
        self.rank = self.node = node
        self.first = node == 0
        self._barrier, self._values = shared

    def gather(self, value):
        self._barrier.wait(10)
        self._values[self.rank] = value
        self._barrier.wait(10)
        return list(self._values)


@pytest.fixture
def guided(tmp_path, monkeypatch):
    """The Maps of a run in `out`, whose passes are made by weights that the test names."""
    write_pngs(tmp_path / "data", {"a": 3, "b": 2}, (8, 8))
    index = ImageIndex(tmp_path / "data")

    monkeypatch.setattr(maps_module, "weights_digest", lambda net: "aa")

    def pass_of(weights):
        def refresh(net, cache, *_, epoch, share, settings, **__):
            part = {"ids": cache.stalest(3, epoch=epoch)} if share < 1 else {}
            level = {"aa": 0.25, "bb": 1.0}[weights]
            with ChunkWriter(cache, epoch, weights=weights, settings=settings, **part) as writer:
                writer.write(writer.pending, np.full((len(writer.pending), 8, 8), level))
            return SimpleNamespace(images=5)

        monkeypatch.setattr(maps_module, "refresh_cache", refresh)

    def make(out="out", **saliency):
        pass_of("aa")
        config = Config(
            data=DataConfig(root=str(tmp_path / "data")),
            out=str(tmp_path / out),
            model="cifar_resnet20",
            epochs=6,
            saliency=SaliencyConfig(batch_size=4, **saliency),
        )
        settings = SimpleNamespace(refresh_every=2, guided=True, neighbors=0)
        image = SimpleNamespace(size=32)
        monkeypatch.setattr(Config, "saliency_image", lambda self: image)
        return Maps(config, settings, make_network("cifar_resnet20", 2), index, None, Here())

    make.pass_of = pass_of
    return make


def refresh(maps, due):
    return maps.refresh(due, ExecConfig(batch_size=4))


def test_a_run_trusts_no_pass_but_its_own(guided):
    maps = guided()
    assert [maps.due(0), maps.due(1), maps.due(2)] == [None, None, 2]
    refresh(maps, 2)
    token = maps.cache.meta.token
    assert maps.made == token
    assert maps.due(3) is None
    # Resumed, from checkpoints of this run, of a version that kept the epoch, and of no pass.
    for made, due in ((token, None), (2, None), (None, 2)):
        again = guided()
        again.made = made
        assert again.due(3) == due
    # Another seed's pass of the same epoch.
    guided.pass_of("bb")
    refresh(again, 2)
    assert again.made != token
    assert (maps.due(3), again.due(3)) == (2, None)
    # One that was begun and has not ended.
    again.cache.begin_pass(4, weights="bb")
    assert again.due(3) == 2


def test_a_second_run_on_a_cache_is_told_at_its_start(guided, tmp_path, capsys):
    shared = str(tmp_path / "shared.lmdb")
    guided("first", cache=shared).cache.close()
    with another_process(shared), pytest.raises(CacheError, match="another process is writing to"):
        guided("second", cache=shared)
    # Once the first has ended, its maps are named.
    first = guided("first", cache=shared)
    refresh(first, 2)
    capsys.readouterr()
    second = guided("second", cache=shared)
    assert [second.due(0), second.due(1)] == [None, None]
    said = capsys.readouterr().err
    assert said.count("note: saliency cache") == 1
    assert "has maps of 5 samples that this run did not make" in said
    assert "until its first pass, at epoch 2" in said
    first.made, first._trained = first.cache.meta.token, False
    first.due(1)
    assert capsys.readouterr().err == ""


def on_nodes(folders, chosen=False):
    """path_of_node on as many nodes, each with its folder."""
    shared = threading.Barrier(len(folders)), [None] * len(folders)
    found = [None] * len(folders)

    def run(node):
        try:
            path = Path(folders[node]) / "saliency.lmdb"
            found[node] = path_of_node(path, Nodes(node, shared), chosen=chosen).name
        except ValueError as error:
            found[node] = error

    threads = [threading.Thread(target=run, args=(node,)) for node in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for folder in folders:
        assert not os.listdir(folder)
    return found


def test_nodes_that_share_a_folder_have_a_cache_each(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    plain = "saliency.lmdb"
    assert on_nodes([one, other]) == [plain, plain]
    assert on_nodes([one, one]) == [plain, "saliency-node1.lmdb"]
    assert on_nodes([one, other, one]) == [plain, plain, "saliency-node2.lmdb"]
    assert on_nodes([one, other], chosen=True) == [plain, plain]
    for error in on_nodes([one, other, one], chosen=True):
        assert "saliency.cache must be on a disk of the node's own" in str(error)
        assert "leave it out for one cache a node" in str(error)
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "saliency.lmdb"
    assert path_of_node(path, Here(), chosen=True) == path  # one node asks nothing


def test_the_token_is_of_all_that_tells_a_pass(path):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        assert cache.meta.token is None
        seen = []
        for more in ({}, {"weights": "bb"}, {"layer": "x"}, {"model": "y"}, {"ids": ALL[:9]}):
            fill(cache, 3, **{"weights": "aa", "layer": "l", "model": "m"} | more)
            seen.append(cache.meta.token)
        fill(cache, 4, weights="aa", layer="l", model="m")
        seen.append(cache.meta.token)
        assert len(set(seen)) == len(seen)
        cache.begin_pass(5)
        assert cache.meta.token is None
        fill(cache, 3, weights="aa", layer="l", model="m")
        assert cache.meta.token == seen[0]
        assert {len(token) for token in seen} == {32}


MEAN, AMP = {"mean": (0.5, 1.0)}, {"amp": "none"}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (MEAN, MEAN, True),
        (MEAN, {"mean": np.array([0.5, 1.0], np.float32)}, True),
        (MEAN, {"mean": [0.5, 2.0]}, False),
        (MEAN | AMP, MEAN | {"amp": "bf16"}, False),
        (None, MEAN, True),  # unknown, as in a cache of an older version
        (MEAN, None, True),
        (MEAN, AMP, True),
    ],
)
def test_a_pass_of_other_settings_is_another_pass(path, first, second, same):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        cache.begin_pass(3, weights="aa", settings=first)
        cache.write(ALL[:40], maps_of(ALL[:40], 1), epoch=3)
        left = cache.begin_pass(3, weights="aa", settings=second)
        assert len(left) == (60 if same else 100)
        cache.write(left, maps_of(left, 2), epoch=3)
        cache.end_pass(3)
        known = {name: list(value) for name, value in (second or first).items() if name == "mean"}
        assert (cache.meta.settings or {}).items() >= known.items()
        # Complete already, for those alone that may be the same.
        third = {"mean": (7.0, 7.0), "amp": "fp16"}
        assert len(cache.begin_pass(3, weights="aa", settings=third)) == 100


def test_what_was_unknown_is_known_once_a_pass_goes_on(path):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        cache.begin_pass(3, weights="aa")
        assert b"settings" not in to_json(cache.meta)  # so that older versions read it
        cache.write(ALL[:40], maps_of(ALL[:40]), epoch=3)
        assert len(cache.begin_pass(3, weights="aa", settings=MEAN)) == 60
        assert len(cache.begin_pass(3, weights="aa", settings=AMP)) == 60
        assert cache.meta.under_way["settings"] == {"mean": [0.5, 1.0], "amp": "none"}
        assert len(cache.begin_pass(3, weights="aa", settings={"mean": 0})) == 100
        fill(cache, 4, weights="aa", settings=MEAN)
        token = cache.meta.token
        fill(cache, 5, weights="aa")
        assert cache.meta.settings is None
        fill(cache, 4, weights="aa", settings={"mean": 0})
        assert cache.meta.token != token
        with pytest.raises(ValueError, match=r"settings must be a dict .* got \{'a': "):
            cache.begin_pass(6, settings={"a": {1}})


@pytest.mark.parametrize("size", [np.int64(224), (224, 448), [np.uint16(224), 448]])
def test_what_json_gives_back_otherwise_is_one_pass(tmp_path, size):
    with SaliencyCache.create(tmp_path / "m", FakeIndex(), grid=GRID, input_size=size) as cache:
        fill(cache, 3, weights="aa")
        assert len(cache.begin_pass(3, weights="aa", input_size=size)) == 0
        assert cache.meta.input_size == np.asarray(size).tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("input_size", size) for size in (224.0, (3, 224, 224), True, 0)],
        *[("model", Path("x")), ("layer", 4), ("method", b"x"), ("weights", b"ab")],
        ("epoch", True),
    ],
)
def test_what_no_meta_record_holds_is_refused_by_name(path, name, value):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        with pytest.raises(ValueError, match=rf"^{name} must be .* got .*"):
            cache.begin_pass(**{"epoch": 3} | {name: value})
        assert cache.meta.under_way is None


@pytest.mark.parametrize("anew", [False, True])
def test_a_cache_that_was_replaced_is_not_written_to(path, anew):
    cache = SaliencyCache(path, index=FakeIndex())

    def make():
        with ChunkWriter(cache, 3, weights="aa", commit_every=10) as writer:
            writer.write(ALL[:10], maps_of(ALL[:10]))
            writer.flush()
            os.rename(path, path + ".old")
            if anew:
                shutil.copytree(path + ".old", path)
            writer.write(ALL[10:], maps_of(ALL[10:]))

    with pytest.raises(CacheError, match=r"was deleted, moved or replaced .*: run again"):
        make()
    for call in (lambda: cache.claim(), lambda: cache.end_pass(3), lambda: cache.begin_pass(4)):
        with pytest.raises(CacheError, match="was deleted, moved or replaced"):
            call()
    if anew:
        with SaliencyCache(path, index=FakeIndex()) as again:
            assert again.census() == ({3: 10}, 0)
            fill(again, 3, weights="aa")
    cache.close()


def test_an_object_has_one_pass_at_a_time(path):
    cache = SaliencyCache(path, index=FakeIndex())
    refused = "this SaliencyCache object has a pass of epoch 3 under way in a ChunkWriter"
    ended = []

    def make(weights):
        try:
            fill(cache, 3, weights=weights)
            ended.append(weights)
        except CacheError as error:
            ended.append(str(error))

    with ChunkWriter(cache, 3, weights="aa", commit_every=10) as writer:
        writer.write(ALL[:60], maps_of(ALL[:60], 1))
        thread = threading.Thread(target=make, args=["bb"])
        thread.start()
        thread.join()
        assert refused in ended.pop()
        with pytest.raises(CacheError, match=refused):
            cache.begin_pass(4)
        writer.write(ALL[60:], maps_of(ALL[60:], 1))
    np.testing.assert_array_equal(cache.read(ALL)[0], maps_of(ALL, 1))
    # One that failed, or that nobody has any more, keeps none from it.
    with pytest.raises(KeyError), ChunkWriter(cache, 4, weights="aa"):
        raise KeyError
    ChunkWriter(cache, 4, weights="aa").__enter__()
    with pytest.raises(ValueError, match="epoch must be"), ChunkWriter(cache, -1):
        pass
    make("bb")
    assert ended == ["bb"]
    cache.close()


def test_passes_that_look_alike_are_told_by_what_differs(pair):
    one, other = pair
    alike = {"weights": "aa", "model": "m", "layer": "l", "method": "gradcam"}
    for more, mine, others in (
        ({"layer": "x"}, "layer l", "layer x"),
        ({"method": "scorecam"}, "method gradcam", "method scorecam"),
        ({"ids": [1, 2]}, "all samples", r"2 samples \([0-9a-f]{8}\)"),
        ({"settings": {"amp": "bf16"}}, "amp none", "amp bf16"),
    ):
        one.begin_pass(3, settings=AMP, **alike)
        other.begin_pass(3, **alike | more)
        base = "epoch 3, model m, weights aa, "
        with pytest.raises(CacheError, match=rf"\({base}{others}\).*\({base}{mine}\)"):
            one.end_pass(3)
    assert other.meta.epoch is None  # once its maps are withdrawn there is no pass to name
    other._replace_meta(other.meta, replace(other.meta, under_way=None))
    with pytest.raises(CacheError, match="another pass has been begun in saliency cache"):
        one.end_pass(3)


def test_maps_of_another_run_guide_no_run_that_is_resumed(guided, tmp_path, capsys):
    def resumed(made):
        again = guided(out, **saliency)
        again.made = made
        capsys.readouterr()
        return again

    gone = "no longer has the maps that this run made before its checkpoint"
    for out, saliency in (
        ("first", {"cache": str(tmp_path / "shared.lmdb"), "share": 0.5}),
        ("second", {"share": 0.5}),
    ):
        first = guided(out, **saliency)
        refresh(first, 2)
        token = first.made
        # Killed in its next pass, or after it.
        again = resumed(token)
        again.cache.begin_pass(4, weights="aa", ids=again.cache.stalest(3, epoch=4))
        assert again.due(4) == 4
        refresh(again, 4)
        again = resumed(token)
        assert again.due(4) == 4
        refresh(again, 4)
        assert again.cache.meta.part == 3
        assert capsys.readouterr().err.count("note") == 0
        # Another run has made a pass, or begun one.
        for ends in (True, False):
            again = resumed(token)
            guided.pass_of("bb")
            refresh(again, 4)
            if not ends:
                again.cache.begin_pass(6, weights="bb")
            for made in (token, 2, *([4] if ends and "cache" in saliency else [])):
                again = resumed(made)
                assert again.due(4) == 4
                said = capsys.readouterr().err
                assert gone in said
                assert ("saliency.cache of its own" in said) == ("cache" in saliency)
        again.cache.begin_pass(4, weights="aa")  # killed
        again = resumed(token)
        refresh(again, again.due(4))
        levels = again.cache.read(np.arange(5))[0]
        assert (levels == levels[0, 0, 0]).all()
        assert again.cache.meta.part is None
        assert again.due(4) is None
        # To an older version's run its epoch is enough where no other run comes.
        older = resumed(4)
        assert older.due(4) == (4 if "cache" in saliency else None)
        assert capsys.readouterr().err.count("note") == 0
        again.cache.close()


class Extra(torch.nn.Linear):
    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_tells_models_apart_and_is_stable():
    def digest(extra):
        torch.manual_seed(0)
        net = torch.nn.Sequential(Extra(2, 2))
        net[0].extra = extra
        return weights_digest(net)

    letters = "abcdefghij"
    pairs = [
        ({"scale": 1.0, "on": True}, {"on": True, "scale": 1.0}, {"scale": 2.0, "on": True}),
        (set(letters), {*"jihgfedcba"}, set(letters[1:])),
        ({"t": torch.ones(2)}, {"t": torch.ones(2)}, {"t": torch.zeros(2)}),
        ([["a"], "b"], [["a"], "b"], [["a", "b"]]),
        (np.arange(3), np.arange(3), np.arange(4)),
        (io.BytesIO(b"x"), io.BytesIO(b"x"), io.BytesIO(b"y")),
        (SimpleNamespace(a=1), SimpleNamespace(a=1), None),
    ]
    for one, same, other in pairs:
        assert digest(one) == digest(same) != digest(other)
    assert digest(set(letters)) == "a509ef69f710801ffd158310527e046d"
