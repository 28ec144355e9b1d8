"""SCAE in DALI Proxy: PyTorch's DataLoader reads and shuffles, and DALI decodes and augments.

    python pipelines/examples/proxy.py --data demo/data --cache demo/maps.lmdb

The DataLoader decides what a batch holds, so it also says which epoch the images are of.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torchvision
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch.experimental import proxy
from torch.utils.data import Dataset

import scae_dali

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, required=True, help="folder that holds train/")
parser.add_argument("--cache", type=Path, required=True, help="folder for the saliency maps")
parser.add_argument("--epochs", type=int, default=4, help="3 or more: maps are made before epoch 2")
args = parser.parse_args()
if args.epochs < 3:
    parser.error(f"--epochs must be 3 or more, got {args.epochs}: maps are made before epoch 2")

BATCH, SIDE = 32, 64
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet, in 0 … 255
device_id = 0 if torch.cuda.is_available() else None
device, decoder = ("cpu", "cpu") if device_id is None else ("cuda", "mixed")

index = scae_dali.ImageIndex(args.data / "train")
scae = scae_dali.SCAE(
    index, args.cache, epochs=args.epochs, batch_size=BATCH, seed=7, refresh_every=2
)
run = {"batch_size": BATCH, "num_threads": 4, "device_id": device_id}


@pipeline_def(**run, enable_conditionals=scae.conditional)
def train():
    jpegs = fn.external_source(name="jpegs", no_copy=True)
    ids = fn.external_source(name="ids", dtype=types.INT64, ndim=1)
    epoch = fn.external_source(name="epoch", dtype=types.INT64, ndim=1)
    shapes = fn.peek_image_shape(jpegs)
    start, size = fn.random_crop_generator(shapes, seed=1)
    images = fn.decoders.image_slice(jpegs, start, size, axis_names="HW", device=decoder)
    images = fn.resize(images, size=(SIDE, SIDE))
    window = (start, size, shapes)
    images, targets = scae(images, ids, window=window, size=(SIDE, SIDE), epoch=epoch)
    flip = fn.random.coin_flip(seed=2)
    return fn.crop_mirror_normalize(images, mirror=flip, mean=MEAN, std=STD), *targets


class Files(Dataset):
    """The encoded images, which the workers read and hand to DALI."""

    def __init__(self, dali):
        self.dali, self.epoch = dali, 0

    def __len__(self):
        return len(index)

    def __getitem__(self, i):
        jpeg = np.fromfile(Path(index.root, index.files[i]), np.uint8)
        return self.dali(jpegs=jpeg, ids=np.array([i]), epoch=np.array([self.epoch]))


model = torchvision.models.resnet18(num_classes=index.num_classes).to(device)
optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

with proxy.DALIServer(train()) as server:
    files = Files(server.proxy)
    # The queue to the server cannot be pickled, so the workers must be forked.
    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    loader = proxy.DataLoader(server, files, batch_size=BATCH, shuffle=True, **workers)
    for epoch in range(args.epochs):
        # Before the workers of this epoch start. With persistent_workers=True they would keep 0.
        files.epoch = epoch
        scae.refresh(model, epoch, size=2 * SIDE)
        for images, labels, partners, mu in loader:
            logits = model(images)
            loss = scae_dali.mixed_cross_entropy(
                logits, *(one.to(device).squeeze(1) for one in (labels, partners, mu))
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        print(f"epoch {epoch}: loss {loss.item():.2f}, {len(images)} images in the last batch")
