"""The offline cache: of folders as of images in memory, with the neighbouring classes; by one
process and by two."""

import numpy as np
import pytest
import torch
from conftest import weights_of, write_pngs
from packs import pack_tars, pack_tfrecords
from pairs import in_two
from PIL import Image

from scae_dali.cache import SaliencyCache
from scae_dali.commands import build_cache
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.scorecam import ScoreCAM
from scae_dali.saliency.weights import nearest_classes

MEAN, STD = (129.0, 124.0, 112.0), (68.0, 65.0, 70.0)


def test_maps_and_neighbours_of_images_in_memory(build, cifar, tmp_path):
    net = weights_of("cifar_resnet20", 2, tmp_path / "w.pt")
    out = tmp_path / "maps.lmdb"
    build(data=cifar, format="cifar10", model="cifar_resnet20", weights=tmp_path / "w.pt",
          out=out, mean=MEAN, std=STD, neighbors=2)  # fmt: skip
    images = ArrayImages.from_cifar(cifar, "cifar10", train=True)
    pixels = torch.tensor(images.pixels).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    wanted = GradCAM(net)((pixels - mean) / std, torch.tensor(images.index.labels))
    with SaliencyCache(out, index=images.index) as cache:
        maps, found = cache.read(np.arange(len(images)))
        assert found.all()
        assert np.abs(maps / 255 - wanted.numpy()).max() < 0.01
        near = nearest_classes(net.fc.weight, images.index.class_counts, 2)
        np.testing.assert_array_equal(cache.read_neighbors(), near)


def test_maps_by_score_cam_and_no_others_over_them(build, tmp_path, capsys):
    write_pngs(tmp_path / "data", {"a": 2, "b": 1}, (32, 32))
    net = weights_of("cifar_resnet20", 2, tmp_path / "w.pt")
    out, index = tmp_path / "maps.lmdb", ImageIndex(tmp_path / "data")
    options = {"data": tmp_path / "data", "model": "cifar_resnet20", "layer": "layer1", "out": out}
    options |= {"weights": tmp_path / "w.pt", "mean": MEAN, "std": STD, "batch_size": 6}
    build(**options, method="scorecam")
    files = [tmp_path / "data" / name for name in index.files]
    pixels = torch.tensor(np.stack([np.asarray(Image.open(file)) for file in files]))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    images = (pixels.permute(0, 3, 1, 2).float() - mean) / std
    wanted = ScoreCAM(net, "layer1")(images, torch.tensor(index.labels))
    with SaliencyCache(out, index=index) as cache:
        meta = cache.meta
        maps, found = cache.read(np.arange(3))
    assert (meta.method, meta.layer, meta.epoch, meta.passes) == ("scorecam", "layer1", 0, 1)
    assert found.all()
    assert np.abs(maps / 255 - wanted.numpy()).max() < 0.01
    build(**options, method="scorecam")
    assert "is complete already: 3 maps" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"maps\.lmdb' has maps by 'scorecam', not 'gradcam'; .* another --out"
    ):
        build(**options, epoch=1)
    with SaliencyCache(out, index=index) as cache:
        assert cache.meta == meta
        np.testing.assert_array_equal(cache.read(np.arange(3))[0], maps)


def test_maps_by_a_method_of_the_package(build, tmp_path, capsys):
    write_pngs(tmp_path / "data", {"a": 2, "b": 1}, (32, 32))
    weights_of("cifar_resnet20", 2, tmp_path / "w.pt")
    out, name = tmp_path / "maps.lmdb", "pytorch_grad_cam:LayerCAM"
    options = {"data": tmp_path / "data", "model": "cifar_resnet20", "out": out}
    options |= {"weights": tmp_path / "w.pt"}
    build(**options, method=name)
    with SaliencyCache(out, index=ImageIndex(tmp_path / "data")) as cache:
        assert (cache.meta.method, cache.meta.layer) == (name, "layer3")
        assert (cache.stamps() == 0).all()
    build(**options, method=name)
    assert "is complete already: 3 maps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"has maps by 'pytorch_grad_cam:LayerCAM', not 'gradcam"):
        build(**options)
    with pytest.raises(SystemExit, match=r"one of gradcam, scorecam, or .*; got 'layercam'"):
        build(**options, method="layercam")


def test_a_cache_of_a_pass_under_way_is_not_begun_anew_either(build, tmp_path):
    write_pngs(tmp_path / "data", {"a": 1, "b": 1}, (32, 32))
    index, out = ImageIndex(tmp_path / "data"), tmp_path / "maps.lmdb"
    options = {"data": tmp_path / "data", "model": "cifar_resnet20", "out": out}
    with SaliencyCache.create(out, index, grid=(8, 8), method=None) as cache:
        cache.begin_pass(0, method="mine")
    for method in ("gradcam", "scorecam"):
        with pytest.raises(SystemExit, match=rf"maps by 'mine', not '{method}'; pass the --method"):
            build(**options, method=method)


def test_a_network_without_a_linear_classifier_gets_no_neighbours(build, tmp_path, capsys):
    write_pngs(tmp_path / "data", {"a": 2, "b": 2}, (32, 32))
    out = tmp_path / "maps.lmdb"
    build(data=tmp_path / "data", model="squeezenet1_0", size=64, out=out)
    assert "the cache gets no neighbouring classes" in capsys.readouterr().err
    with SaliencyCache(out, index=ImageIndex(tmp_path / "data")) as cache:
        assert cache.read_neighbors() is None
        assert (cache.stamps() == 0).all()


def test_maps_of_a_network_of_timm(build, tmp_path):
    write_pngs(tmp_path / "data", {"a": 2, "b": 1}, (32, 32))
    out, name = tmp_path / "maps.lmdb", "timm:resnet10t"
    net = weights_of(name, 2, tmp_path / "w.pt")
    build(data=tmp_path / "data", model=name, weights=tmp_path / "w.pt", size=64, out=out)
    with SaliencyCache(out, index=ImageIndex(tmp_path / "data")) as cache:
        assert (cache.meta.model, cache.meta.layer) == (name, "layer4")
        assert tuple(cache.meta.grid) == GradCAM(net).grid(64) == (2, 2)
        assert (cache.stamps() == 0).all()


def test_a_tail_of_folders_is_made_as_a_list(build, tmp_path):
    with pytest.raises(SystemExit, match=r"--imbalance is for .*, got 10.0 with .*make_longtail"):
        build(data=tmp_path, model="resnet18", out=tmp_path / "maps.lmdb", imbalance=10)


CHEAP = ["--device=cpu", "--size=32", "--batch-size=4", "--threads=1", "--model=cifar_resnet20"]
# Runs the command several times, and says how each ended, on a line that is written at once.
BUILDS = """
import contextlib, io, os, torch
from scae_dali.commands import build_cache
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
def say(text):
    os.write(1, f"{{rank}} {{text}}\\n".encode())
{before}
for argv in {argvs}:
    os.environ["MASTER_PORT"] = ports.pop()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            build_cache.main([one.replace("RANK", str(rank)) for one in argv])
            ended = "done"
        except SystemExit as stop:
            ended = str(stop.code)
    say(f"{{ended}} {{printed.getvalue()}}".replace("\\n", " "))
"""


def built_by_two(*argvs: list[str], before: str = "") -> tuple[list[str], list[str]]:
    """What each of two processes says that run the command with each of these options in turn, of
    which RANK is the number of the process. before: code."""
    lines = in_two(BUILDS.format(argvs=argvs, before=before)).splitlines()
    first, second = ([line[2:] for line in lines if line[0] == rank] for rank in "01")
    return first, second


def same_caches(one, other, index=None):
    with SaliencyCache(one, index=index) as cache, SaliencyCache(other, index=index) as wanted:
        (ids, records), (all_ids, all_records) = cache.records(), wanted.records()
        np.testing.assert_array_equal(ids, all_ids)
        np.testing.assert_array_equal(records, all_records)
        np.testing.assert_array_equal(cache.read_neighbors(), wanted.read_neighbors())
        assert cache.meta == wanted.meta
        assert cache.meta.under_way is None


def test_two_processes_make_what_one_makes(cifar):
    """Of folders, of a list by the names of its files, and of images in memory."""
    write_pngs(cifar / "data", {"a": 12, "b": 7}, (32, 32))
    index = ImageIndex(cifar / "data")
    files = zip(index.files, index.labels, strict=True)
    (cifar / "list.txt").write_text("".join(f"{name} {label}\n" for name, label in files))
    ways = {
        "folder": [f"--data={cifar / 'data'}"],
        "list": [f"--data={cifar / 'data'}", f"--list={cifar / 'list.txt'}", "--naming=path"],
        "cifar": [f"--data={cifar}", "--format=cifar10", "--imbalance=2"],
    }
    for name, way in ways.items():
        build_cache.main([*CHEAP, *way, f"--out={cifar / name}-one.lmdb"])
    unchecked = "from torchvision.datasets import cifar\ncifar.check_integrity = lambda *_: True"
    by_two = [[*CHEAP, *way, f"--out={cifar / name}-two.lmdb"] for name, way in ways.items()]
    first, second = built_by_two(*by_two, by_two[0], before=unchecked)
    assert second == ["done "] * 4  # the first process speaks for both
    assert "folder-two.lmdb: 19 maps of 19 in" in first[0]
    assert "folder-two.lmdb is complete already: 19 maps" in first[3]
    for name in ways:
        same = None if name == "cifar" else index
        same_caches(f"{cifar / name}-two.lmdb", f"{cifar / name}-one.lmdb", same)


def test_a_process_that_fails_ends_both_and_another_number_goes_on(tmp_path, capsys):
    write_pngs(tmp_path / "data", {"a": 16, "b": 8}, (32, 32))
    index = ImageIndex(tmp_path / "data")
    argv = [*CHEAP, f"--data={tmp_path / 'data'}"]
    build_cache.main([*argv, f"--out={tmp_path / 'one.lmdb'}"])
    broken = tmp_path / "data" / index.files[19]  # the second process makes the odd ones
    sound = broken.read_bytes()
    broken.write_bytes(sound[:200])
    two = [*argv, f"--out={tmp_path / 'two.lmdb'}"]
    often = "from scae_dali.cache import writer\nwriter.COMMIT_S = 0"
    first, second = built_by_two(two, before=often)
    assert first == ["error: another process has ended before its time; its own message says why "]
    assert second[0].startswith("error: ")
    assert index.files[19] in second[0]
    with SaliencyCache(tmp_path / "two.lmdb", index=index) as cache:
        known = cache.read(range(24))[1]
        assert cache.meta.under_way["epoch"] == 0
    assert known[:8].all()
    assert not known[19]
    broken.write_bytes(sound)
    capsys.readouterr()
    build_cache.main(two)  # alone
    assert f"two.lmdb: {24 - known.sum()} maps of 24 in" in capsys.readouterr().out
    same_caches(tmp_path / "two.lmdb", tmp_path / "one.lmdb", index)


def test_nodes_that_see_one_folder_have_one_cache_and_others_one_each(tmp_path):
    """And what one of them lacks is told by both."""
    write_pngs(tmp_path / "data", {"a": 6, "b": 5}, (32, 32))
    weights_of("cifar_resnet20", 2, tmp_path / "w0.pt")
    argv = [*CHEAP, f"--data={tmp_path / 'data'}"]
    build_cache.main([*argv, f"--out={tmp_path / 'one.lmdb'}"])
    nodes = """
os.environ |= dict(GROUP_RANK=str(rank), LOCAL_RANK="0")
create = build_cache.SaliencyCache.create
def told(path, *given, **named):
    say(f"writes {path}")
    return create(path, *given, **named)
build_cache.SaliencyCache.create = told
"""
    shared = tmp_path / "shared.lmdb"
    options = [f"--out={shared}"], [f"--out={tmp_path}/nodeRANK/maps.lmdb"]
    lacking = [f"--out={tmp_path}/none.lmdb", f"--weights={tmp_path}/wRANK.pt"]
    by_two = ([*argv, *more] for more in (*options, lacking))
    first, second = built_by_two(*by_two, before=nodes)
    assert first[:1] + second[:1] == [f"writes {shared}", "done "]
    same_caches(shared, tmp_path / "one.lmdb")
    for node, lines in enumerate((first[2:], second[1:])):
        assert lines[0] == f"writes {tmp_path}/node{node}/maps.lmdb"
        assert lines[1].startswith("done ")
        assert "w1.pt" in lines[-1]
        same_caches(tmp_path / f"node{node}" / "maps.lmdb", tmp_path / "one.lmdb")


def test_archives_give_the_maps_of_their_files(build, tailed, tmp_path):
    """Under the names that DALI's readers give."""
    weights_of("cifar_resnet20", 5, tmp_path / "w.pt")
    options = {"model": "cifar_resnet20", "weights": tmp_path / "w.pt", "threads": 1}
    (tmp_path / "list.txt").write_text(
        "".join(f"{f} {k}\n" for f, k in zip(tailed.files, tailed.labels, strict=True))
    )
    build(data=tailed.root, list=tmp_path / "list.txt", out=tmp_path / "files", **options)
    with SaliencyCache(tmp_path / "files", index=tailed) as cache:
        wanted, found = cache.read(np.arange(63))
    assert found.all()
    for format, pack, make in (
        ("webdataset", pack_tars, ImageIndex.from_webdataset),
        ("tfrecord", pack_tfrecords, ImageIndex.from_tfrecord),
    ):
        pattern = pack(tailed, tmp_path / format)
        build(data=tmp_path / format, format=format, archives=pattern, naming="path",
              out=tmp_path / f"{format}.lmdb", **options)  # fmt: skip
        index = make(pattern, tmp_path / format)
        with SaliencyCache(tmp_path / f"{format}.lmdb", index=index) as cache:
            np.testing.assert_array_equal(cache.read(np.arange(63))[0], wanted)
            given = index.files if format == "tfrecord" else ["train-0000.tar:512:a/00.png"]
            np.testing.assert_array_equal(index.ids_of(given), np.arange(len(given)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "webdataset"}, "--archives must name the archives with --format webdataset, g"),
        (
            {"format": "tfrecord", "archives": "t", "list": "l.txt"},
            "--list is for --format folder, got 'l.txt' with --format tfrecord; leave it out",
        ),
        (
            {"format": "tfrecord", "archives": "t", "imbalance": 10},
            "--imbalance is for --format cifar10 or cifar100, got 10.0 with --format tfrecord",
        ),
        ({"archives": "t-*.tar"}, "--archives is for --format webdataset or tfrecord, got 't-"),
        ({"first_label": 1, "list": "l.txt"}, "--first-label is for --format webdataset or tfre"),
        ({"format": "cifar10", "index_cache": "d"}, "--index-cache is for .*, got 'd' with --form"),
        ({"format": "cifar100", "exclude": "l.txt"}, "--exclude is for --format folder or webda"),
        ({"format": "cifar10", "label_field": "y"}, "--label-field is for --format tfrecord, got"),
        ({"format": "webdataset", "archives": "t-{0..1}.tar"}, "the archive '.*/t-0.tar' .* does"),
    ],
)
def test_options_that_do_not_fit_the_format_are_refused(build, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        build(data=tmp_path, model="cifar_resnet20", out=tmp_path / "maps.lmdb", **options)
