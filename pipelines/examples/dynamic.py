"""SCAE in DALI's dynamic mode, where operators run as they are called, without a pipeline.

    python pipelines/examples/dynamic.py --data demo/data --cache demo/maps.lmdb

Dynamic mode fills rectangles. It cannot mix images or run policies: for these, define a pipeline.
"""

import argparse
from pathlib import Path

import nvidia.dali.experimental.dynamic as ndd
import torch
import torchvision

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
device = "cuda" if torch.cuda.is_available() else "cpu"
decoder = "gpu" if device == "cuda" else "cpu"

index = scae_dali.ImageIndex(args.data / "train")
scae = scae_dali.SCAE(
    index, args.cache, epochs=args.epochs, batch_size=BATCH, seed=7, refresh_every=2, mix_prob=0
)
reader = ndd.readers.File(
    files=list(index.files), file_root=index.root, shuffle_after_epoch=True, pad_last_batch=True
)
random = ndd.random.RNG(seed=1)
model = torchvision.models.resnet18(num_classes=index.num_classes).to(device)
optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

for epoch in range(args.epochs):
    scae.refresh(model, epoch, size=2 * SIDE)
    for number, (jpegs, ids) in enumerate(reader.next_epoch(batch_size=BATCH)):
        shapes = ndd.peek_image_shape(jpegs)
        start, size = ndd.random_crop_generator(shapes, rng=random)
        images = ndd.decoders.image_slice(jpegs, start, size, axis_names="HW", device=decoder)
        images = ndd.resize(images, size=(SIDE, SIDE))
        images, targets = scae.dynamic(images, ids, epoch, window=(start, size, shapes))
        flip = ndd.random.coin_flip(batch_size=images.batch_size, rng=random, device="cpu")
        images = ndd.crop_mirror_normalize(images, mirror=flip, mean=MEAN, std=STD)
        left = len(index) - number * BATCH  # the reader fills up the last batch with copies
        labels = targets.label.torch()[:left, 0].to(device)
        logits = model(images.torch()[:left])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"epoch {epoch}: loss {loss.item():.2f}, {len(labels)} images in the last batch")
