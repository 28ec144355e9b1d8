"""The main job on real photographs, where there are any.

SCAE_PHOTOGRAPHS names a tar of ImageNet files, `…/<wnid>/*.JPEG`; the default is
shared/data/imagenet500.tar beside the checkout.
"""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.models import shufflenet_v2_x0_5

from pipelines import saliency, train, val
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.methods import Status
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.refresh import refresh_cache
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage

DEFAULT = Path(__file__).parents[3] / "shared" / "data" / "imagenet500.tar"
TAR = Path(os.environ.get("SCAE_PHOTOGRAPHS", DEFAULT))
pytestmark = pytest.mark.skipif(not TAR.exists(), reason="no photographs; set SCAE_PHOTOGRAPHS")
IMAGE = ImageConfig(size=96, val_resize=112)
RUN = ExecConfig(batch_size=50, threads=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    with tarfile.open(TAR) as archive:
        archive.extractall(root, filter="data")
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    return ImageIndex(folder)


@pytest.fixture(scope="module")
def cache(index, tmp_path_factory):
    """Filled by a pass with a random network."""
    torch.manual_seed(0)
    model = shufflenet_v2_x0_5(num_classes=index.num_classes)
    grid = GradCAM(model).grid(IMAGE.size)
    path = tmp_path_factory.mktemp("cache") / "maps.lmdb"
    cache = SaliencyCache.create(path, index, grid=grid)

    def loader_for(ids):
        pipeline = saliency.saliency_pipeline(index, IMAGE, RUN, ids)
        return Loader(pipeline, saliency.OUTPUTS, index, drop_last=False)

    report = refresh_cache(model, cache, index, loader_for, epoch=1)
    assert report.images == len(index)
    return cache


def test_every_photograph_is_upright_and_whole_in_the_saliency_pass(index):
    """Against Pillow: all sizes, greyscale and EXIF orientations."""
    ids = np.arange(0, len(index), 7).tolist()
    ids += [i for i, name in enumerate(index.files) if odd(f"{index.root}/{name}")]
    pipeline = saliency.saliency_pipeline(index, IMAGE, RUN, ids)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGE.mean, IMAGE.std))
    seen = 0
    for batch in Loader(pipeline, saliency.OUTPUTS, index, drop_last=False):
        for i, picture in zip(batch.ids.tolist(), batch.images * std + mean, strict=True):
            with Image.open(f"{index.root}/{index.files[i]}") as file:
                upright = ImageOps.exif_transpose(file).convert("RGB")
            size = (IMAGE.size, IMAGE.size)
            other = np.asarray(upright.resize(size, Image.Resampling.BILINEAR), np.float32)
            assert np.abs(picture.permute(1, 2, 0).numpy() - other).mean() < 3
            seen += 1
    assert seen == len(ids)


def odd(path):
    with Image.open(path) as file:
        return file.mode != "RGB" or file.getexif().get(0x0112, 1) > 1


def test_training_erases_at_the_planned_places_on_all_photographs(index, cache):
    stage = Stage(index, "scae", epochs=4, batch_size=50, seed=1, cache=cache, start_epoch=2)
    plain = Stage(index, "none", epochs=4, batch_size=50, seed=1, start_epoch=2)
    loaders = [
        Loader(train.train_pipeline(one, IMAGE, RUN, seed=1), train.OUTPUTS, index, drop_last=False)
        for one in (stage, plain)
    ]
    ids, erased, unguided = [], 0, 0
    for batch, reference in zip(*loaders, strict=True):
        assert (batch.ids == reference.ids).all()
        changed = (batch.images != reference.images).any(1)
        area = (batch.boxes[:, 2] * batch.boxes[:, 3]).long()
        # A pixel may have the fill's colour already; nothing outside the box may change.
        assert (changed.sum((1, 2)) <= area).all()
        assert (changed.sum((1, 2)) >= 0.9 * area).all()
        ids += batch.ids.tolist()
        erased += int((batch.status & Status.ERASED).bool().sum())
        unguided += int((batch.status & (Status.NO_MAP | Status.FLAT_MAP)).bool().sum())
    assert sorted(ids) == list(range(len(index)))
    assert abs(erased / len(index) - 0.5) < 0.1
    assert unguided < 0.2 * erased


def test_validation_gives_each_once(index):
    pipeline = val.val_pipeline(index, IMAGE, RUN)
    batches = list(Loader(pipeline, val.OUTPUTS, index, drop_last=False))
    assert torch.cat([b.ids for b in batches]).tolist() == list(range(len(index)))
    assert all(b.images.isfinite().all() for b in batches)
