"""The whole of a training with SCAE: saliency passes, validation, checkpoints, resuming.

    python pipelines/examples/own_loop.py --data demo/data --out demo/own_loop

Started again, the same command goes on after the last epoch that was finished.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from nvidia.dali import fn, pipeline_def

import scae_dali

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, required=True, help="folder that holds train/ and val/")
parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and maps")
parser.add_argument("--epochs", type=int, default=4, help="3 or more: maps are made before epoch 2")
args = parser.parse_args()
if args.epochs < 3:
    parser.error(f"--epochs must be 3 or more, got {args.epochs}: maps are made before epoch 2")
args.out.mkdir(parents=True, exist_ok=True)
checkpoint = args.out / "checkpoint.pt"
BATCH, SIDE = 32, 64  # for ImageNet 256 and 224
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet, in 0 … 255
device_id = 0 if torch.cuda.is_available() else None
device, decoder = ("cpu", "cpu") if device_id is None else ("cuda", "mixed")
index = scae_dali.ImageIndex(args.data / "train")
scae = scae_dali.SCAE(  # the default, refresh_every=10, is meant for 100 epochs
    index, args.out / "maps.lmdb", epochs=args.epochs, batch_size=BATCH, seed=7, refresh_every=2
)
run = {"batch_size": BATCH, "num_threads": 4, "device_id": device_id}


@pipeline_def(**run, enable_checkpointing=True, enable_conditionals=scae.conditional)
def train():
    jpegs, ids = fn.readers.file(
        files=list(index.files), file_root=index.root,
        name="Reader", shuffle_after_epoch=True, pad_last_batch=True,
    )  # fmt: skip
    shapes = fn.peek_image_shape(jpegs)
    start, size = fn.random_crop_generator(shapes, seed=1)
    images = fn.decoders.image_slice(jpegs, start, size, axis_names="HW", device=decoder)
    images = fn.resize(images, size=(SIDE, SIDE))
    images, targets = scae(images, ids, window=(start, size, shapes), size=(SIDE, SIDE))
    flip = fn.random.coin_flip(seed=2)
    return fn.crop_mirror_normalize(images, mirror=flip, mean=MEAN, std=STD), *targets


loader = scae_dali.Loader(train(), ["images", *scae.outputs], index, drop_last=True)
val_index = scae_dali.ImageIndex(args.data / "val")
val = scae_dali.whole_loader(
    val_index, size=SIDE, resize=SIDE * 8 // 7, batch_size=BATCH, device_id=device_id
)
model = torchvision.models.resnet18(num_classes=index.num_classes).to(device)
optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.epochs)

parts = (model, optimiser, schedule, loader, scae)  # all that has a state
if checkpoint.exists():
    for part, state in zip(parts, torch.load(checkpoint, map_location=device), strict=True):
        part.load_state_dict(state)

for epoch in range(loader.epoch, args.epochs):
    scae.refresh(model, epoch, size=2 * SIDE)  # enlarged, small images give finer maps
    model.train()
    for batch in loader:
        logits = model(batch.images)
        loss = scae_dali.mixed_cross_entropy(logits, batch.labels, batch.partners, batch.mu)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    schedule.step()
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(batch.images).argmax(1) == batch.labels for batch in val])
    print(f"epoch {epoch}: loss {loss.item():.2f}, accuracy {right.float().mean().item():.1%}")
    torch.save([part.state_dict() for part in parts], args.out / "new.pt")
    (args.out / "new.pt").replace(checkpoint)  # at once, whatever happens
