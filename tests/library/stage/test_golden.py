"""Plans, orders, random numbers and cache records are what they have always been.

Runs that were begun with an earlier version depend on them. `golden.npz` holds what the code gave
when the file was made. Whole numbers must be equal, others equal to 1e-9.

`PYTHONPATH=. python tests/test_golden.py` writes the file anew. A change of the file is a change of
what users get: it needs a reason.
"""

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from hashlib import blake2b, shake_128
from pathlib import Path
from typing import Any, NamedTuple, get_args

import lmdb
import numpy as np
import pytest

from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.methods import BUILT_IN, Status
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import ID, Order, Sampling, epoch_size
from scae_dali.plan.random import Stream, uniforms
from scae_dali.stage.stage import Stage

GOLDEN = Path(__file__).with_name("golden.npz")
SEED = 11
T = 8  # epochs of a run
EPOCHS = (1, 4, 7)  # those that are looked at; λ > 0 in all of them
BATCH = 16
SIZE = {"files": (56, 40), "memory": (32, 32)}  # (H, W) of the crops
CLASS_COUNTS = (28, 10, 5, 3, 0, 1)
CLASSES = len(CLASS_COUNTS)
N = sum(CLASS_COUNTS)
LABELS = np.empty(N, np.int64)
LABELS[np.arange(N) * 13 % N] = np.repeat(np.arange(CLASSES), CLASS_COUNTS)  # 13 and N are coprime
NEIGHBORS = [[1, 2], [2, 3], [3, 4], [5, 1], [0, 1], [3, 0]]


class Case(NamedTuple):
    """A stage whose rows are kept.

    cache: the naming of the saliency cache; None: there is none. sampling, crop: of the images in
    memory.
    """

    method: str
    settings: dict[str, Any]
    cache: str | None = "index"
    start_epoch: int = 0
    sampling: Sampling = "shuffle"
    crop: CropConfig = CropConfig()


GRID = {"d_min": 8, "d_max": 20}
NO_MIX = {"mix_prob": 0.0}
CMO: dict[str, Any] = {"skip_first": 0, "skip_last": 0}
SEVERAL: dict[str, Any] = {"tail": 0.5, "p_max": 0.9}
CASES = {
    "none": Case("none", {}),
    "random_erasing": Case("random_erasing", {}),
    "random_erasing torchvision": Case("random_erasing", {"preset": "torchvision"}),
    "random_erasing timm": Case("random_erasing", {"preset": "timm", "prob": 0.8}),
    "random_erasing color": Case("random_erasing", {"fill": "color", "aspect_law": "log"}),
    "random_erasing no fit": Case(
        "random_erasing", {"area": (0.5, 0.95), "aspect": (0.2, 5.0), "tries": 1, "prob": 1.0}
    ),
    "cutout": Case("cutout", {}),
    "cutout color": Case("cutout", {"fill": "color", "prob": 0.6, "length": 14}),
    "grid_mask": Case("grid_mask", GRID),
    "grid_mask ramp": Case(
        "grid_mask", GRID | {"ramp_epochs": 6, "rotate": 0, "ratio": 0.4, "fill": "color"}
    ),
    "scae": Case("scae", {}),
    "scae by path": Case("scae", {}, cache="path"),
    "scae without a cache": Case("scae", {"tail": 0.5}, cache=None),
    "scae clip": Case("scae", SEVERAL | {"border": "clip", "lam_max": 6.0}),
    "scae color": Case("scae", SEVERAL | {"fill": "color"}),
    "scae log": Case("scae", SEVERAL | {"aspect_law": "log", "lam_max": 12.0}),
    "scae protects": Case("scae", {"lam_max": -8.0, "p_min": 0.4, "p_max": 1.0, "gamma": 1.0}),
    "scae tail": Case("scae", {"tail": 0.5, "tail_erase": "always", "tail_lambda": -1.0}),
    "scae alike": Case("scae", {"class_aware": False, "p_max": 0.8}),
    "scae mixes": Case("scae", {"tail": 1.0, "mix_prob": 0.9, "mix_alpha": 1.0, "neighbors": 2}),
    "scae mixes within the class": Case("scae", {"tail": 0.5, "mix_prob": 1.0, "neighbors": 0}),
    "scae steep": Case("scae", SEVERAL | {"lam_max": 100.0, "p_min": 0.9}),
    "scae unguided": Case("scae", {"lam_max": 0.0, "p_min": 0.5}),
    "scae offline": Case("scae", SEVERAL | {"refresh_every": 0}),
    "scae begun later": Case("scae", SEVERAL, start_epoch=3),
    "scae class_balanced": Case("scae", SEVERAL, sampling="class_balanced"),
    "scae pad": Case("scae", SEVERAL, crop=CropConfig(kind="pad", flip=0.3)),
    "scae own crop": Case("scae", {}, crop=CropConfig(area=(0.5, 0.9), aspect=(2.0, 3.0), tries=1)),
    "semantic_grid_mask": Case("semantic_grid_mask", GRID),
    "semantic_grid_mask protects": Case(
        "semantic_grid_mask", SEVERAL | GRID | {"lam_max": -9.0, "rotate": 0, "fill": "color"}
    ),
    "rand_augment": Case("rand_augment", {}),
    "rand_augment in pixels": Case("rand_augment", {"n": 3, "m": 14, "max_translate_rel": None}),
    "trivial_augment": Case("trivial_augment", {}),
    "auto_augment": Case("auto_augment", {}),
    "auto_augment reduced_image_net": Case("auto_augment", {"policy": "reduced_image_net"}),
    "auto_augment reduced_cifar10": Case("auto_augment", {"policy": "reduced_cifar10"}),
    "auto_augment svhn": Case("auto_augment", {"policy": "svhn"}),
    "keep_augment cut": Case("keep_augment", {}),
    "keep_augment cut color": Case(
        "keep_augment", {"fill": "color", "tau": 0.85, "candidates": 5, "prob": 0.7}
    ),
    "keep_augment paste": Case("keep_augment", {"mode": "paste", "n": 3, "m": 5}),
    "mixup": Case("mixup", {}),
    "mixup per batch": Case("mixup", {"per": "batch", "alpha": 0.2, "prob": 0.7}),
    "cutmix": Case("cutmix", {"prob": 0.6}),
    "cutmix per batch": Case("cutmix", {"per": "batch"}),
    "saliency_mix": Case("saliency_mix", {"prob": 0.8}),
    "saliency_mix official": Case("saliency_mix", {"preset": "official"}),
    "cmo": Case("cmo", {"skip_last": 0}),
    "cmo per sample": Case("cmo", CMO | {"per": "sample", "weight_power": 0.5, "alpha": 2.0}),
    "cmo saliency": Case("cmo", CMO | {"saliency": True, "prob": 0.8}),
    "rand_augment+scae": Case("rand_augment+scae", {"rand_augment": {"n": 1}}),
    "scae+auto_augment": Case("scae+auto_augment", {"scae": SEVERAL}),
    "auto_augment+random_erasing+mixup": Case(
        "auto_augment+random_erasing+mixup", {"mixup": {"prob": 0.5}}
    ),
    "cutmix+grid_mask+trivial_augment": Case(
        "cutmix+grid_mask+trivial_augment", {"grid_mask": GRID, "cutmix": {"alpha": 4.0}}
    ),
    "cutout+saliency_mix": Case("cutout+saliency_mix", {}),
    "scae+saliency_mix": Case("scae+saliency_mix", {"scae": SEVERAL | NO_MIX}),
    "rand_augment+semantic_grid_mask": Case(
        "rand_augment+semantic_grid_mask", {"semantic_grid_mask": SEVERAL | GRID}
    ),
    "rand_augment+scae+cmo": Case(
        "rand_augment+scae+cmo", {"scae": SEVERAL | NO_MIX, "cmo": CMO | {"saliency": True}}
    ),
    "keep_augment paste+cutmix": Case("keep_augment+cutmix", {"keep_augment": {"mode": "paste"}}),
    "rand_augment+keep_augment+mixup": Case("rand_augment+keep_augment+mixup", {}),
}


def noise(what: str, n: int) -> np.ndarray:
    """uint8 [n], the same on every machine."""
    return np.frombuffer(shake_128(what.encode()).digest(n), np.uint8)


def make_index() -> ImageIndex:
    names = [f"{k}/{i:02d}.jpg" for i, k in enumerate(LABELS)]
    return ImageIndex.from_arrays(names, LABELS, num_classes=CLASSES)


def make_cache(path: Path, index: ImageIndex, naming: str) -> SaliencyCache:
    """Every sixth map is missing, and every ninth constant."""
    cache = SaliencyCache.create(
        path, index, grid=(7, 7), naming=naming, model="net", layer="last", input_size=(56, 40)
    )
    ids = np.flatnonzero(np.arange(N) % 6 != 4)
    maps = noise("maps", N * 49).reshape(N, 7, 7).copy()
    maps[::9] = maps[::9, :1, :1]
    cache.begin_pass(3, ids=ids, weights="5eed", settings={"mean": [1.5, 2.0, 3.0]})
    cache.write(ids, maps[ids], epoch=3)
    cache.end_pass(3)
    cache.write_neighbors(np.array(NEIGHBORS, np.uint16))
    return cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, SaliencyCache]:
    return make_caches(tmp_path_factory.mktemp("golden"))


def make_caches(folder: Path) -> dict[str, SaliencyCache]:
    index = make_index()
    return {name: make_cache(folder / f"{name}.lmdb", index, name) for name in ("index", "path")}


def read_by_files(epoch: int, shard: int, num_shards: int) -> np.ndarray:
    """Ids of an epoch as DALI's file reader gives them without shuffling: it goes on to the next
    shard every epoch, and repeats the last sample until the last batch is full."""
    shard = (shard + epoch) % num_shards
    ids = np.arange(N * shard // num_shards, N * (shard + 1) // num_shards)
    batches = math.ceil(math.ceil(N / num_shards) / BATCH)
    return np.append(ids, np.full(batches * BATCH - len(ids), ids[-1]))


def shapes_of(ids: np.ndarray) -> np.ndarray:
    """(h, w) of the upright images, int64 [B, 2]: 40 to 103 pixels."""
    return 40 + noise("shapes", 2 * N).reshape(N, 2)[ids].astype(np.int64) % 64


def windows_of(ids: np.ndarray, epoch: int) -> np.ndarray:
    """Crops that were drawn elsewhere, float64 [B, 6]: start, shape, and the image's shape."""
    full = shapes_of(ids)
    drawn = noise(f"windows of {epoch}", 4 * N).reshape(N, 4)[ids].astype(np.int64)
    shape = 16 + drawn[:, 2:] * (full - 15) // 256
    start = drawn[:, :2] * (full - shape + 1) // 256
    return np.concatenate([start, shape, full], axis=1).astype(np.float64)


def plans(
    case: Case, caches: dict[str, SaliencyCache], way: str, seed: int = SEED, shards=(1, 2)
) -> Iterator[tuple[Any, np.ndarray]]:
    """Planner and rows of every epoch that is looked at, on every shard."""
    index = make_index()
    for num_shards in shards:
        sampling: Sampling = case.sampling if way == "memory" else "shuffle"
        stage = Stage(
            index,
            case.method,
            epochs=T,
            batch_size=BATCH,
            seed=seed,
            cache=None if case.cache is None else caches[case.cache],
            num_shards=num_shards,
            epoch_size=epoch_size(LABELS, sampling),
            start_epoch=case.start_epoch,
            **case.settings,
        )
        for shard in range(num_shards):
            order = Order(
                LABELS,
                batch_size=BATCH,
                seed=seed,
                sampling=sampling,
                shard=shard,
                num_shards=num_shards,
                start_epoch=case.start_epoch,
            )
            planner = stage.planner(*([] if way == "files" else [case.crop]), keyed=way != "files")
            for epoch in EPOCHS:
                if way == "files":
                    keys = read_by_files(epoch, shard, num_shards)
                    window = windows_of(keys, epoch)
                else:
                    keys = order.keys(epoch * order.batches, order.batches)[: 4 * BATCH]
                    window = shapes_of(keys & ID).astype(np.float64)
                batch = epoch * stage.batches_per_epoch + np.arange(len(keys)) // BATCH
                size_px = np.tile(SIZE[way], (len(keys), 1))
                yield planner, planner(keys, batch, size_px, window)


def columns_of(
    case: Case, caches: dict[str, SaliencyCache], way: str, **keywords
) -> dict[str, np.ndarray]:
    """What is kept of a case: every column of its rows, the crops of its partners, and what
    becomes of their boxes."""
    planners, tables = zip(*plans(case, caches, way, **keywords), strict=True)
    planner, rows = planners[0], np.concatenate(tables)
    out = {name: rows[:, part] for name, part in planner.columns.items()}
    if "partner_id" in out:
        mixed = rows[out["status"][:, 0].astype(np.int64) & Status.MIXED > 0]
        full_px = shapes_of(mixed[:, planner.columns["partner_id"]][:, 0].astype(np.int64))
        settled, window, flip = planner.settle(mixed, full_px, case.crop)
        out["partner_crop"] = np.column_stack([window, flip]).astype(np.float64)
        if planner.pastes:
            names = ("status", "mu", "paste_anchors")
            out["settled"] = np.hstack([settled[:, planner.columns[name]] for name in names])
    return out


def everything_in(path: str | Path) -> dict[bytes, bytes]:
    """Keys and values of an LMDB file, in its order; of a copy, since a process opens one once."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(path, Path(folder) / "copy")
        with lmdb.open(str(copy), lock=False) as environment, environment.begin() as txn:
            return {bytes(key): bytes(value) for key, value in txn.cursor()}


def records(path: str) -> dict[str, np.ndarray]:
    """Keys of a cache's records and digests of their values, as bytes, without the meta record."""
    pairs = everything_in(path)
    del pairs[b"meta"]
    digests = [blake2b(value, digest_size=8).digest() for value in pairs.values()]
    return {
        "keys": np.frombuffer(b"".join(pairs), np.uint8),
        "values": np.frombuffer(b"".join(digests), np.uint8),
    }


def random_words() -> dict[str, np.ndarray]:
    """32-bit words, and so exact."""
    ids = np.array([0, 1, 12345, 7 | 3 << 32])
    return {
        f"{stream.name} {seed} {epoch}": uniforms(seed, stream, epoch, ids, 5) * 2.0**32 - 0.5
        for stream in Stream
        for seed, epoch in ((0, 0), (2**64 - 3, 90))
    }


def orders() -> dict[str, np.ndarray]:
    """Keys of three epochs, on one shard and two."""
    keywords = {"batch_size": BATCH, "seed": SEED}
    out = {}
    for sampling in get_args(Sampling):
        for shard, num_shards in ((0, 1), (0, 2), (1, 2)):
            order = Order(LABELS, sampling=sampling, shard=shard, num_shards=num_shards, **keywords)
            epochs = [order.keys(t * order.batches, order.batches) for t in range(3)]
            out[f"{sampling} {shard} of {num_shards}"] = np.array(epochs)
    return out


def pack(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Many small arrays as one array a type, those that are equal once; `unpack` undoes it."""
    contents: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[np.ndarray]] = {}
    known: dict[bytes, dict[str, Any]] = {}
    for name, array in arrays.items():
        if (array == np.floor(array)).all():
            low, high = (int(array.min(initial=0)), int(array.max(initial=0)))
            array = array.astype(np.result_type(*map(np.min_scalar_type, (low, high))))
        kind = array.dtype.name
        same = f"{kind} {array.shape} ".encode() + array.tobytes()
        if same not in known:
            begin = sum(part.size for part in parts.setdefault(kind, []))
            # Column by column, which compresses better.
            parts[kind].append(array.ravel(order="F"))
            known[same] = {"kind": kind, "begin": begin, "shape": array.shape}
        contents[name] = known[same]
    told = np.frombuffer(json.dumps(contents).encode(), np.uint8)
    return {"contents": told} | {kind: np.concatenate(part) for kind, part in parts.items()}


def unpack(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        packed = dict(file)
    out = {}
    for name, entry in json.loads(packed["contents"].tobytes()).items():
        begin, size = entry["begin"], int(np.prod(entry["shape"]))
        flat = packed[entry["kind"]][begin : begin + size]
        out[name] = flat.reshape(entry["shape"], order="F")
    return out


def differences(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> list[str]:
    """What is not as it was: the names of arrays, with the first place."""
    out = [f"{name} is in one alone" for name in sorted(found.keys() ^ wanted.keys())]
    for name in found.keys() & wanted.keys():
        a, b = found[name], wanted[name]
        if a.shape != b.shape:
            out.append(f"{name} has the shape {a.shape}, not {b.shape}")
            continue
        whole = b.dtype.kind in "iu"
        wrong = a != b if whole else ~(np.abs(a - b) <= 1e-9)
        if wrong.any():
            first = tuple(int(k) for k in np.argwhere(wrong)[0])
            out.append(
                f"{name}: {wrong.sum()} of {a.size}, the first {a[first]} instead of {b[first]} "
                f"at {first}"
            )
    return sorted(out)


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, np.ndarray]]:
    """Arrays by name, of each group."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in unpack(GOLDEN).items():
        group, _, rest = name.rpartition("/")
        groups.setdefault(group, {})[rest] = array
    return groups


def test_every_method_has_a_case():
    assert {name for case in CASES.values() for name in case.method.split("+")} == {*BUILT_IN}


def test_golden_has_these_cases(golden):
    kept = {group.rpartition("/")[0] for group in golden if group.startswith("plan/")}
    assert kept == {f"plan/{name}" for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_plans(golden, caches, name):
    for way in SIZE:
        found = columns_of(CASES[name], caches, way)
        assert differences(found, golden[f"plan/{name}/{way}"]) == []


# What depends on the sample alone, and what is drawn for the crop.
GIVEN = {"label", "id", "epoch", "key"}
CROPPED = {"start", "shape", "window", "flip"}


@pytest.mark.parametrize("name", CASES)
def test_another_seed_gives_other_plans(golden, caches, name):
    """So `test_plans` can fail, for every case and every part of it that is drawn."""
    for way in SIZE:
        wanted = golden[f"plan/{name}/{way}"]
        found = columns_of(CASES[name], caches, way, seed=SEED + 1)
        changed = {text.split(":")[0].split(" has ")[0] for text in differences(found, wanted)}
        assert changed.isdisjoint(CROPPED) == (way == "files")
        method = changed - GIVEN - CROPPED - {"partner"}
        assert bool(method) == (name != "none"), way
        varies = {name for name, values in wanted.items() if len(np.unique(values, axis=0)) > 1}
        still = varies - changed - GIVEN - CROPPED - {"partner"}
        assert still <= {"status"}, way  # it may tell of the sample's map alone


def test_the_cases_show_every_status(golden):
    columns = [columns for group, columns in golden.items() if group.startswith("plan/")]
    seen = {int(status) for one in columns for status in np.unique(one["status"])}
    assert {kind for kind in Status if any(kind & status for status in seen)} == {*Status}


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("scae", "box"),
        ("scae clip", "box"),
        ("semantic_grid_mask protects", "grid"),
        ("keep_augment cut", "box"),
        ("keep_augment paste", "kept_anchors"),
        ("saliency_mix", "paste_anchors"),
    ],
)
def test_maps_change_the_plans(golden, caches, name, column):
    for way in SIZE:
        found = columns_of(CASES[name]._replace(cache=None), caches, way)[column]
        assert (found != golden[f"plan/{name}/{way}"][column]).any()


def test_orders(golden):
    assert differences(orders(), golden["order"]) == []


def test_random_numbers(golden):
    assert differences(random_words(), golden["random"]) == []


@pytest.mark.parametrize("naming", ["index", "path"])
def test_cache_records(golden, caches, naming):
    """The records of both namings; those of a sample are of the same bytes."""
    assert differences(records(caches[naming].path), golden[f"cache/{naming}"]) == []


def test_the_meta_record_of_a_cache(tmp_path):
    """Before a pass, after it, and during another one, which withdraws its maps first."""
    path, index = tmp_path / "maps.lmdb", make_index()
    cache = make_cache(path, index, "path")
    done = {
        "format": 1,
        "grid": [7, 7],
        "samples": 47,
        "fingerprint": "ed06e66ca50bdbe936774cc2e86e2143",
        "naming": "path",
        "method": "gradcam",
        "model": "net",
        "layer": "last",
        "input_size": [56, 40],
        "weights": "5eed",
        "epoch": 3,
        "passes": 1,
        "under_way": None,
        "neighbors": [6, 2],
        "part": 39,
        "which": "a45a03145b15d9461f7fdd892ea1fd4a",
        "settings": {"mean": [1.5, 2.0, 3.0]},
    }
    assert meta_record(path) == done
    assert cache.meta.token == "7ba87668b6acc44a6f3f75df23fc0f14"
    cache.begin_pass(3, weights="0ther")
    pass_of = {name: done[name] for name in ("method", "model", "layer", "input_size")}
    under_way = {"epoch": 3, "weights": "0ther", "part": None, "which": None, **pass_of}
    assert meta_record(path) == done | {"epoch": None, "under_way": under_way}
    withdrawn = [value for key, value in everything_in(path).items() if len(key) == 8]
    assert withdrawn == [b""] * 39
    empty = SaliencyCache.create(tmp_path / "empty.lmdb", index, grid=(2, 3))
    fields = dict.fromkeys(done) | {"format": 1, "grid": [2, 3], "samples": 47, "passes": 0}
    fields |= {"fingerprint": done["fingerprint"], "naming": "index", "method": "gradcam"}
    del fields["settings"]  # an older version knows none
    assert meta_record(empty.path) == fields | {"weights": ""}


def meta_record(path: str | Path) -> dict[str, Any]:
    return json.loads(everything_in(path)[b"meta"])


def test_numbers_of_streams_and_values_of_status():
    assert {stream.name: int(stream) for stream in Stream} == {
        "CROP": 0,
        "ERASE": 1,
        "CENTRE": 2,
        "COLOR": 3,
        "MIX": 4,
        "PARTNER": 5,
        "PARTNER_CROP": 6,
        "ORDER": 7,
        "PERMUTATION": 8,
        "BATCH_MIX": 9,
        "POLICY": 10,
        "GRID": 11,
        "REGION": 12,
        "STALEST": 13,
    }
    assert {status.name: int(status) for status in Status} == {
        "ERASED": 1,
        "NO_MAP": 2,
        "FLAT_MAP": 4,
        "NO_FIT": 8,
        "MIXED": 16,
        "MIXED_IN_BATCH": 32,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        caches = make_caches(Path(folder))
        kept = {
            f"plan/{name}/{way}/{column}": values
            for name, case in CASES.items()
            for way in SIZE
            for column, values in columns_of(case, caches, way).items()
        }
        for naming, cache in caches.items():
            told = records(cache.path)
            kept |= {f"cache/{naming}/{part}": array for part, array in told.items()}
    kept |= {f"order/{name}": keys for name, keys in orders().items()}
    kept |= {f"random/{name}": words for name, words in random_words().items()}
    np.savez_compressed(GOLDEN, **pack(kept))
    print(f"{GOLDEN}: {len(kept)} arrays, {GOLDEN.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
