"""Geometry, proven: what eq. 4 predicts for a known object is what is seen in the pixels.

A blue disc lies at a known place of every image, and its saliency map marks that place. Whether the
disc's centre is erased is read from the output pixels alone; how often it should be follows from
eq. 4, summed here by brute force over the windows that the crop drew.
"""

import json

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image, ImageDraw

from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.plan.crop import CropConfig
from scae_dali.saliency.stage import SCAE, Stage
from scae_dali.stage.loader import Loader

N, SIZE, GRID = 160, 64, 7
ORIENTATION = 0x0112
# How stored pixels become upright: EXIF 6 means "turn by 90° clockwise", so store them turned back.
STORE = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
SCAE_SETTINGS = {"p_min": 1.0, "p_max": 1.0, "lam_max": 6.0, "fill": "zero"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Images with a disc: a third of them greyscale, a third EXIF-rotated; index, places, cache."""
    root = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(0)
    places = {}
    (root / "only").mkdir()
    for k in range(N):
        height, width = rng.integers(70, 140, 2).tolist()
        y, x = rng.uniform(0.15, 0.85, 2).tolist()
        image = Image.new("RGB", (width, height), (200, 200, 200))
        r = 0.14 * min(height, width)
        disc = [x * width - r, y * height - r, x * width + r, y * height + r]
        ImageDraw.Draw(image).ellipse(disc, fill=(110, 110, 110))
        name = f"only/{k:03d}.jpg"
        if k % 3 == 1:
            image = image.convert("L")
        exif = Image.Exif()
        if k % 3 == 2:
            exif[ORIENTATION] = orientation = list(STORE)[k % 9 // 3]
            image = image.transpose(STORE[orientation])
        image.save(root / name, quality=95, exif=exif)
        places[name] = (y, x)
    (root / "places.json").write_text(json.dumps(places))
    index = ImageIndex(root)
    cache = SaliencyCache.create(root.parent / "scene.lmdb", index, grid=(GRID, GRID))
    cells = (np.arange(GRID) + 0.5) / GRID
    centre = np.array([places[name] for name in index.files])
    distance = (cells[:, None] - centre[:, 0, None, None]) ** 2
    distance = distance + (cells[None, :] - centre[:, 1, None, None]) ** 2
    maps = np.exp(-distance / 0.03)
    maps = (maps - maps.min((1, 2), keepdims=True)) / np.ptp(maps, axis=(1, 2), keepdims=True)
    cache.begin_pass(0)
    cache.write(np.arange(N), maps, epoch=0)
    cache.end_pass(0)
    return index, centre, cache


def bilinear(saliency, y, x):
    """Â at places (y, x) of the full frame, by torch: float64 [len(y), len(x)]."""
    grid = np.stack(np.meshgrid(2 * x - 1, 2 * y - 1, indexing="xy"), axis=-1)
    return torch.nn.functional.grid_sample(
        torch.from_numpy(saliency)[None, None],
        torch.from_numpy(grid)[None],
        padding_mode="border",
        align_corners=False,
    )[0, 0].numpy()


def cover_probability(saliency, lam, window, hw, pixel):
    """P(box covers pixel) by eq. 4 with border mode inside: the sum over all centres that do."""
    h, w = hw
    y = window[0] + (np.arange(SIZE) + 0.5) / SIZE * window[2]
    x = window[1] + (np.arange(SIZE) + 0.5) / SIZE * window[3]
    p = np.exp(lam * bilinear(saliency, y, x))
    p = p[h // 2 : SIZE - h + h // 2 + 1, w // 2 : SIZE - w + w // 2 + 1]  # by top-left corner
    p = p / p.sum()
    top, left = np.arange(p.shape[0]), np.arange(p.shape[1])
    rows = (top <= pixel[0]) & (pixel[0] < top + h)
    columns = (left <= pixel[1]) & (pixel[1] < left + w)
    return p[rows][:, columns].sum()


def compare(rows, maps):
    """rows: (id, window, box size, disc's pixel in the unflipped crop, seen erased). A z-score."""
    expected = variance = seen = 0.0
    for i, lam, window, hw, pixel, erased in rows:
        p = cover_probability(maps[i] / 255, lam, window, hw, pixel)
        expected, variance, seen = expected + p, variance + p * (1 - p), seen + erased
    return (seen - expected) / np.sqrt(variance), seen / len(rows)


def disc_pixel(centre, window):
    """Where the disc's centre lies in the crop, and whether well inside."""
    place = (centre - window[:2]) / window[2:] * SIZE
    pixel = np.floor(place).astype(int)
    return pixel, bool(((place > 3) & (place < SIZE - 3)).all())


def look(image, pixel):
    """What is seen at the disc's centre: disc (dark grey), erased (black), or neither."""
    value = image[:, pixel[0], pixel[1]].mean()
    return "erased" if value < 30 else "disc" if abs(value - 110) < 40 else "neither"


def denormalise(images, image):
    mean, std = (torch.tensor(v)[:, None, None] for v in (image.mean, image.std))
    return (images * std + mean).numpy()


@pytest.mark.parametrize("decode", ["roi", "full"])
def test_train_pipeline_covers_the_object_as_often_as_eq_4_says(scene, decode):
    index, centres, cache = scene
    epochs = 6
    image = ImageConfig(size=SIZE, val_resize=SIZE, crop=CropConfig(area=(0.3, 1.0)), decode=decode)
    stage = Stage(index, "scae", epochs=epochs, batch_size=32, seed=5, cache=cache, **SCAE_SETTINGS)
    pipeline = files.train_pipeline(stage, image, ExecConfig(batch_size=32, threads=2), seed=5)
    loader = Loader(pipeline, files.OUTPUTS, index, drop_last=False)
    maps, _ = cache.read(np.arange(N))
    shapes = upright(index)
    planner = stage.planner(image.crop)
    rows, kinds = [], []
    for epoch in range(epochs):
        for batch in loader:
            ids = batch.ids.numpy()
            iteration = np.full(len(ids), epoch * stage.batches_per_epoch)
            size_px = np.full((len(ids), 2), SIZE)
            planned = planner(ids, iteration, size_px, shapes[ids])
            pictures = denormalise(batch.images, image)
            for i, picture, box, decided in zip(
                ids, pictures, batch.boxes.numpy(), planned, strict=True
            ):
                cut = np.concatenate([decided[planner.columns[k]] for k in ("start", "shape")])
                window = cut / np.tile(shapes[i], 2)
                flip = decided[planner.columns["flip"]][0]
                pixel, inside = disc_pixel(centres[i], window)
                if not inside or not box[2]:
                    continue
                if flip:
                    picture = picture[:, :, ::-1]
                seen = look(picture, pixel)
                assert seen != "neither", "the disc is not where the window and the flip say"
                covered = bool(((box[:2] <= pixel) & (pixel < box[:2] + box[2:])).all())
                assert covered == (seen == "erased"), "the box is not where the pixels say"
                lam = 6.0 * epoch / epochs
                rows.append((i, lam, window, box[2:].astype(int), pixel, seen == "erased"))
                kinds.append((i % 3, flip))
    assert len(rows) > 600
    z, rate = compare(rows, maps)
    assert abs(z) < 3.5
    assert rate > 0.3
    for kind in range(3):  # plain, greyscale, EXIF-rotated; flipped and not
        for flip in range(2):
            part = [r for r, k in zip(rows, kinds, strict=True) if k == (kind, flip)]
            assert abs(compare(part, maps)[0]) < 3.5
    # The same comparison sees a map that is not turned with the image.
    turned = np.ascontiguousarray(maps[:, ::-1])
    assert abs(compare(rows, turned)[0]) > 5


def upright(index):
    """Shapes after EXIF, float64 [N, 2], by Pillow."""
    shapes = []
    for name in index.files:
        with Image.open(f"{index.root}/{name}") as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) in (6, 8)
        shapes.append((width, height) if turned else (height, width))
    return np.array(shapes, float)


def test_a_users_own_crop_and_flip_keep_the_frame(scene):
    """The README's pipeline, with DALI's own crop; window given, size asked from the images."""
    index, centres, cache = scene
    epochs, batch_size = 4, 40
    scae = SCAE(index, cache=cache, epochs=1, batch_size=batch_size, seed=9, **SCAE_SETTINGS)

    @pipeline_def(batch_size=batch_size, num_threads=2, device_id=None, enable_checkpointing=True)
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, name="Reader", pad_last_batch=True
        )
        shapes = fn.peek_image_shape(encoded)
        start, size = fn.random_crop_generator(shapes, seed=1, random_area=[0.3, 1.0])
        images = fn.decoders.image_slice(encoded, start=start, shape=size, axis_names="HW")
        images = fn.resize(images, size=(SIZE, SIZE))
        images, targets = scae(images, ids, window=(start, size, shapes))
        flip = fn.random.coin_flip(seed=2)
        images = fn.crop_mirror_normalize(images, mirror=flip, output_layout="CHW")
        return images, ids, start, size, shapes, flip, *targets

    pipeline = define()
    maps, _ = cache.read(np.arange(N))
    rows = []
    for step in range(epochs * N // batch_size):
        out = [np.asarray(o.as_array()) for o in pipeline.run()]
        images, ids, start, size, shapes, flip, label, partner, mu = out
        assert (label == partner).all()
        assert (mu == 1).all()
        lam = 6.0 * min(step // (N // batch_size), 1)
        for k, i in enumerate(ids[:, 0]):
            full = shapes[k, :2]
            window = np.concatenate([start[k] / full, size[k] / full])
            pixel, inside = disc_pixel(centres[i], window)
            picture = images[k][:, :, ::-1] if flip[k] else images[k]
            hw = box_size(picture)
            if inside and hw is not None:
                seen = look(picture, pixel)
                assert seen != "neither"
                rows.append((i, lam, window, hw, pixel, seen == "erased"))
    assert len(rows) > 400
    z, _ = compare(rows, maps)
    assert abs(z) < 3.5


def box_size(picture):
    """(h, w) of the black rectangle in a picture; None where there is none."""
    black = picture.max(0) < 8
    if not black.any():
        return None
    rows, columns = np.flatnonzero(black.any(1)), np.flatnonzero(black.any(0))
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
