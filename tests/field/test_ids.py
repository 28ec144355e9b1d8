"""What is passed as a sample's id and is none.

DALI's file reader gives class labels unless it is asked otherwise, and a label looks like a place
in the index: half of all labels came out wrong. Members of several tars may have one name, and one
label then served two images. Sources: https://github.com/NVIDIA/DALI/issues/1759 and
https://github.com/NVIDIA/DALI/issues/3170 (no id but the label), and
https://github.com/webdataset/webdataset/issues/157 (one name in several tars).
"""

import tarfile

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, tfrecord, types
from nvidia.dali.pipeline import Pipeline

from scae_dali import Loader
from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.stage.stage import Stage
from scae_dali.stage.wiring import EachOnce

BATCH = 5


def planned(index, ids_of, **stage):
    """The pipeline of a stage whose ids are ids_of()."""
    one = Stage(index, "none", epochs=2, batch_size=BATCH, seed=1, **stage)

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
    def define():
        plan = one.plan(ids_of(), size=(24, 24))
        return plan.id, plan.targets.label

    return define()


def epoch(pipeline, samples):
    outputs = [pipeline.run() for _ in range(-(-samples // BATCH))]
    ids, labels = (
        np.concatenate([np.asarray(out[k].as_array())[:, 0] for out in outputs]) for k in (0, 1)
    )
    return ids[:samples], labels[:samples]


def reader(output=1, **keywords):
    return lambda: fn.readers.file(pad_last_batch=True, **keywords)[output]


@pytest.fixture
def lists(index, tmp_path):
    """Lists as fn.readers.file takes them: with the classes, and with the places in the index."""
    for name, labels in (("classes", index.labels), ("places", range(50))):
        lines = [f"{file} {label}\n" for file, label in zip(index.files, labels, strict=True)]
        (tmp_path / name).write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    "case", ["root", "list", "labels", "another order", "fewer", "cast", "reshaped"]
)
def test_class_labels_are_refused_when_the_graph_is_made(index, lists, case):
    root, files = index.root, list(index.files)
    of_root = reader(file_root=root)
    ids_of = {
        "root": of_root,
        "list": reader(file_root=root, file_list=str(lists / "classes")),
        "labels": reader(file_root=root, files=files, labels=index.labels.tolist()),
        "another order": reader(file_root=root, files=files[::-1]),
        "fewer": reader(file_root=root, files=files[1:]),
        "cast": lambda: fn.cast(of_root(), dtype=types.INT64),
        "reshaped": lambda: fn.reshape(of_root(), shape=[1]),
    }[case]
    with pytest.raises(ValueError, match=r"ids must be places .* without labels=, or .*get_proper"):
        planned(index, ids_of)


@pytest.mark.parametrize("case", ["files", "list", "labels", "absolute", "elsewhere", "name"])
def test_ids_and_names_are_taken(index, lists, case, tmp_path):
    root, files = index.root, list(index.files)
    elsewhere = tmp_path / "copy"
    elsewhere.symlink_to(root)
    shuffled = np.random.default_rng(0).permutation(50)
    ids_of = {
        "files": reader(file_root=root, files=files),
        "list": reader(file_root=root, file_list=str(lists / "places")),
        "labels": reader(
            file_root=root, files=[files[i] for i in shuffled], labels=shuffled.tolist()
        ),
        "absolute": reader(files=[f"{root}/{name}" for name in files]),
        "elsewhere": reader(file_root=str(elsewhere), files=files),
        "name": lambda: fn.get_property(reader(0, file_root=root)(), key="source_info"),
    }[case]
    ids, labels = epoch(planned(index, ids_of), 50)
    assert sorted(ids) == list(range(50))
    assert labels.tolist() == index.labels[ids].tolist()


def test_images_and_other_properties_are_no_ids(index):
    with pytest.raises(ValueError, match="got the reader's first output, which is the encoded"):
        planned(index, reader(0, file_root=index.root))
    with pytest.raises(ValueError, match="got the property 'stream_order'"):
        planned(index, lambda: fn.get_property(reader(0, file_root=index.root)(),
                                               key="stream_order"))  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (np.float32, "ids must be integers that hold the places 0 … 299, got float32; pass"),
        (np.int8, "ids must be integers that hold the places 0 … 299, got int8"),
    ],
)
def test_ids_that_do_not_hold_every_place_are_refused(dtype, message):
    index = ImageIndex.from_arrays([f"{i}.jpg" for i in range(300)], np.zeros(300, int))
    source = np.arange(BATCH).astype(dtype)[:, None]
    ids = lambda: fn.external_source(source=lambda: source, batch=True)  # noqa: E731
    with pytest.raises(RuntimeError, match=message):
        planned(index, ids).run()


def examples(path, labels):
    """A TFRecord file of records with nothing but a label, and DALI's index of it."""
    offsets = []
    with open(path, "wb") as out:
        for label in labels:
            value = bytes([0x1A, 3, 0x0A, 1, label])  # Feature{int64_list{value: [label]}}
            entry = b"\x0a\x05label\x12" + bytes([len(value)]) + value
            feature = b"\x0a" + bytes([len(entry)]) + entry
            example = b"\x0a" + bytes([len(feature)]) + feature
            offsets.append((out.tell(), 16 + len(example)))
            out.write(len(example).to_bytes(8, "little") + bytes(4) + example + bytes(4))
    path.with_suffix(".idx").write_text("".join(f"{a} {b}\n" for a, b in offsets))


@pytest.mark.parametrize("unique", [True, False])
def test_numbers_of_another_reader_must_come_once_an_epoch(index, tmp_path, unique):
    """The same graph with places in the index, and with class labels."""
    numbers = np.random.default_rng(1).permutation(50) if unique else index.labels
    examples(tmp_path / "r.tfrecord", numbers.tolist())

    def ids_of():
        return fn.readers.tfrecord(
            path=str(tmp_path / "r.tfrecord"),
            index_path=str(tmp_path / "r.idx"),
            features={"label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1)},
            pad_last_batch=True,
        )["label"]

    pipeline = planned(index, ids_of)
    if unique:
        assert sorted(epoch(pipeline, 50)[0]) == list(range(50))
        assert sorted(epoch(pipeline, 50)[0]) == list(range(50))  # the watch is over
    else:
        with pytest.raises(RuntimeError, match=r"came twice: are they class labels\? Pass ids=fn"):
            epoch(pipeline, 50)


def test_a_label_that_comes_twice_is_told():
    index = ImageIndex.from_arrays([f"{i}.jpg" for i in range(12)], np.arange(12) % 9)
    watch = EachOnce(index)
    watch.look(np.arange(5))
    watch.look(np.arange(5, 8))
    with pytest.raises(ValueError, match="but 7 came twice"):
        watch.look(np.array([8, 7]))
    with pytest.raises(ValueError, match="but 7 came twice"):
        EachOnce(index).look(np.array([3, 7, 7]))
    EachOnce(index).look(np.array([3, 7, 11, 7]))  # a sampler's: 11 is no label


@pytest.mark.parametrize("epoch_size", [50, 40])
def test_labels_by_way_of_arithmetic_are_found_when_they_repeat(index, epoch_size):
    """Whatever part of the index is read, and in batches as large as an epoch."""
    files = list(index.files)[:epoch_size]
    labels = index.labels[:epoch_size].tolist()
    disguised = reader(file_root=index.root, files=files, labels=labels)
    for batch in (BATCH, epoch_size):
        one = Stage(index, "none", epochs=2, batch_size=batch, seed=1, epoch_size=epoch_size)

        @pipeline_def(batch_size=batch, num_threads=1, device_id=None)
        def define(one=one):
            return one.plan(disguised() + 0, size=(24, 24)).id

        with pytest.raises(RuntimeError, match=r"came twice: are they class labels\?"):
            define().run()


@pytest.mark.parametrize("labels", ["classes", "places"])
def test_a_loader_is_not_given_class_labels_either(index, lists, labels):
    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(
            file_root=index.root, file_list=str(lists / labels), name="Reader",
            shuffle_after_epoch=True, pad_last_batch=True,
        )  # fmt: skip
        return fn.resize(fn.decoders.image(encoded), size=(8, 8)), ids

    loader = Loader(define(), ["images", "id"], index, drop_last=False)
    if labels == "classes":
        with pytest.raises(ValueError, match=r"ids must be places in the index, .* came twice"):
            list(loader)
    else:
        for _ in range(2):
            assert sorted(i for batch in loader for i in batch.ids.tolist()) == list(range(50))


@pytest.fixture
def tars(folder, index, tmp_path):
    """Two tars, whose members have the same names: six images each."""
    chosen = [[0, 1, 2, 30, 31, 32], [45, 46, 33, 3, 4, 47]]
    for number, ids in enumerate(chosen):
        with tarfile.open(tmp_path / f"s{number}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for k, i in enumerate(ids):
                archive.add(folder / index.files[i], f"{k:04d}.jpg")
    return tmp_path, [index.labels[ids] for ids in chosen]


def members(where):
    paths = [str(where / f"s{number}.tar") for number in range(2)]
    encoded = fn.readers.webdataset(paths=paths, ext=["jpg"], pad_last_batch=True)
    return fn.get_property(encoded[0] if isinstance(encoded, list) else encoded, key="source_info")


def test_members_of_two_tars_go_by_their_archive(tars):
    where, labels = tars
    names = [f"s{number}.tar/{k:04d}.jpg" for number in range(2) for k in range(6)]
    index = ImageIndex.from_arrays(names, np.concatenate(labels))
    ids, given = epoch(planned(index, lambda: members(where)), 12)
    assert ids.tolist() == list(range(12))
    assert given.tolist() == np.concatenate(labels).tolist()


def test_one_id_from_two_tars_is_refused(tars):
    """Also where the numbers of samples agree: the index has six more that are nowhere."""
    where, labels = tars
    names = [f"{k:04d}.jpg" for k in range(12)]
    index = ImageIndex.from_arrays(names, np.concatenate(labels))
    places = r"two places, .*s0.tar:\d+:0000.jpg' and .*s1.tar:\d+:0000.jpg'"
    with pytest.raises(RuntimeError, match=rf"'0000.jpg' comes from {places}.*s1.tar/0000.jpg"):
        epoch(planned(index, lambda: members(where)), 12)


def test_names_of_archives_are_taken_as_long_as_they_are_known():
    files = ["a/s.tar/0.jpg", "b/s.tar/0.jpg", "t.tar/d/0.jpg", "1.jpg"]
    index = ImageIndex.from_arrays(files, np.zeros(4, int), root="/data")
    names = index.names()
    asked = ["/data/a/s.tar:512:0.jpg", "/x/b/s.tar:512:0.jpg", "t.tar:0:d/0.jpg", "t.tar:9:1.jpg"]
    assert names.ids(asked).tolist() == [0, 1, 2, 3]
    assert names.ids(asked[::-1]).tolist() == [3, 2, 1, 0]  # the same places again
    with pytest.raises(DatasetError, match=r"'t.tar:0:d/0.jpg' and 't.tar:1:d/0.jpg'"):
        names.ids(["t.tar:1:d/0.jpg"])
    with pytest.raises(DatasetError, match=r"'t.tar:0:d/0.jpg' and 'u/t.tar:0:d/0.jpg'"):
        index.ids_of(["t.tar:0:d/0.jpg", "u/t.tar:0:d/0.jpg"])


def test_the_advice_for_twins_in_a_list_does_not_lead_to_one_label_for_two():
    twins = ImageIndex.from_arrays(["0.jpg", "1.jpg", "0.jpg"], [0, 1, 2])
    with pytest.raises(DatasetError, match=r"list members of several archives as archive.tar/m"):
        twins.keys("path")


@pytest.mark.parametrize("number", [(1 << 32) + 3, (7 << 32) + 1, -1, 50])
def test_the_planner_refuses_ids_outside_the_index(index, number):
    planner = Stage(index, "cutout", epochs=2, batch_size=BATCH, seed=1).planner()
    ids = np.array([3, number])
    with pytest.raises(IndexError, match=rf"ids must be in \[0, 50\), .* got {number}; let the"):
        planner(ids, np.zeros(2, np.int64), np.full((2, 2), 24))


def test_archives_need_no_ending_and_readers_may_begin_with_a_dot():
    files = ["shard-0/0.jpg", "shard-1/0.jpg", "Bd/s.tar.wds/1.jpg", "2.npy"]
    index = ImageIndex.from_arrays(files, np.zeros(4, int))
    asked = ["/x/shard-0:512:0.jpg", "shard-1:0:./0.jpg", "/d/Bd/s.tar.wds:0:1.jpg", "./2.npy"]
    assert index.ids_of(asked).tolist() == [0, 1, 2, 3]
    with pytest.raises(DatasetError, match=r"list members as archive/member, such as b/shard-0/0"):
        index.ids_of(["a/shard-0:0:0.jpg", "b/shard-0:0:0.jpg"])


def test_images_and_ids_of_two_readers_are_refused(index):
    one = Stage(index, "cutout", epochs=2, batch_size=BATCH, seed=1)

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
    def define(permuted):
        keywords = {"file_root": index.root, "files": list(index.files), "pad_last_batch": True}
        encoded, ids = fn.readers.file(**keywords, name="A")
        images = fn.resize(fn.decoders.image(encoded), size=(24, 24))
        if permuted:
            indices = fn.batch_permutation(seed=1)
            images = fn.permute_batch(images, indices=indices)
            ids = fn.permute_batch(ids, indices=indices) if permuted == "both" else ids
        else:
            _, ids = fn.readers.file(**keywords, name="B")
        images, targets = one(images, ids, size=(24, 24))
        return images, *targets

    with pytest.raises(ValueError, match="ids must be of the samples that the images are of, g"):
        define(None)
    with pytest.raises(ValueError, match=r"ids must be in the order of the images, but fn.perm"):
        define("images")
    define("both").run()


def test_no_pipeline_is_kept_alive_by_its_stage(index):
    import gc
    import weakref

    pipeline = planned(index, reader(file_root=index.root, files=list(index.files)))
    pipeline.run()
    assert isinstance(pipeline, Pipeline)
    gone = weakref.ref(pipeline)
    del pipeline
    gc.collect()
    assert gone() is None
