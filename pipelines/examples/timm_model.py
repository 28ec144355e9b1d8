"""A network and an optimiser of timm, trained with SCAE.

    python pipelines/examples/timm_model.py --data demo/data --cache demo/timm.lmdb

Needs `pip install timm`. The layer that maps are made from is known for timm's usual networks. For
others the error names some that work: pass one to `scae.refresh` as `layer=`.
"""

import argparse
from pathlib import Path

import timm
import timm.data
import timm.optim
import torch
from nvidia.dali import fn, pipeline_def

import scae_dali

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, required=True, help="folder that holds train/")
parser.add_argument("--cache", type=Path, required=True, help="folder for the saliency maps")
parser.add_argument("--model", default="resnet10t", help="name of a network of timm")
parser.add_argument("--pretrained", action="store_true", help="begin with timm's weights")
parser.add_argument("--optimiser", default="adamw", help="name of an optimiser of timm")
parser.add_argument("--epochs", type=int, default=4, help="3 or more: maps are made before epoch 2")
args = parser.parse_args()
if args.epochs < 3:
    parser.error(f"--epochs must be 3 or more, got {args.epochs}: maps are made before epoch 2")

BATCH, SIDE = 32, 64
device_id = 0 if torch.cuda.is_available() else None
device, decoder = ("cpu", "cpu") if device_id is None else ("cuda", "mixed")

index = scae_dali.ImageIndex(args.data / "train")
settings = {"pretrained": args.pretrained, "num_classes": index.num_classes}
model = timm.create_model(args.model, **settings).to(device)
known = timm.data.resolve_model_data_config(model)  # mean and std of images in 0 … 1
mean, std = ([255 * one for one in known[name]] for name in ("mean", "std"))
scae = scae_dali.SCAE(
    index, args.cache, epochs=args.epochs, batch_size=BATCH, seed=7, refresh_every=2,
    mean=mean, std=std,
)  # fmt: skip
run = {"batch_size": BATCH, "num_threads": 4, "device_id": device_id}


@pipeline_def(**run, enable_conditionals=scae.conditional)
def train():
    jpegs, ids = fn.readers.file(
        files=list(index.files), file_root=index.root,
        name="Reader", random_shuffle=True, pad_last_batch=True,
    )  # fmt: skip
    shapes = fn.peek_image_shape(jpegs)
    start, size = fn.random_crop_generator(shapes, seed=1)
    images = fn.decoders.image_slice(jpegs, start, size, axis_names="HW", device=decoder)
    images = fn.resize(images, size=(SIDE, SIDE))
    images, targets = scae(images, ids, window=(start, size, shapes), size=(SIDE, SIDE))
    flip = fn.random.coin_flip(seed=2)
    return fn.crop_mirror_normalize(images, mirror=flip, mean=mean, std=std), *targets


loader = scae_dali.Loader(train(), ["images", *scae.outputs], index, drop_last=True)
optimiser = timm.optim.create_optimizer_v2(model, opt=args.optimiser, lr=1e-3, weight_decay=0.05)

for epoch in range(args.epochs):
    report = scae.refresh(model, epoch, size=2 * SIDE)
    model.train()
    for batch in loader:
        logits = model(batch.images)
        loss = scae_dali.mixed_cross_entropy(logits, batch.labels, batch.partners, batch.mu)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"epoch {epoch}: loss {loss.item():.2f}, {report.images if report else 0} new maps")
