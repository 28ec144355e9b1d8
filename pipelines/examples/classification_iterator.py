"""SCAE in a pipeline that has labels of its own, read by DALI's DALIClassificationIterator.

    python pipelines/examples/classification_iterator.py --data demo/data --cache demo/maps.lmdb

The pipeline below was there before SCAE. The two lines marked `# new` are all that was added to it.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

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
# The iterator gives one label for an image. So images of rare classes are not mixed: mix_prob=0.
scae = scae_dali.SCAE(
    index, args.cache, epochs=args.epochs, batch_size=BATCH, seed=7, refresh_every=2, mix_prob=0
)


@pipeline_def(batch_size=BATCH, num_threads=4, device_id=device_id)
def train():
    jpegs, labels = fn.readers.file(
        file_root=args.data / "train", name="Reader", random_shuffle=True, pad_last_batch=True
    )
    images = fn.decoders.image(jpegs, device=decoder)
    images = fn.resize(images, size=(SIDE, SIDE))
    ids = fn.get_property(jpegs, key="source_info")  # new
    images, _ = scae(images, ids, size=(SIDE, SIDE))  # new
    flip = fn.random.coin_flip(seed=2)
    images = fn.crop_mirror_normalize(images, mirror=flip, mean=MEAN, std=STD)
    return images, labels if device_id is None else labels.gpu()


loader = DALIClassificationIterator(
    train(), reader_name="Reader", last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
)
model = torchvision.models.resnet18(num_classes=index.num_classes).to(device)
optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

for epoch in range(args.epochs):
    scae.refresh(model, epoch, size=2 * SIDE)
    right = 0
    for (batch,) in loader:
        labels = batch["label"].squeeze(1).long()
        logits = model(batch["data"])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        right += (logits.argmax(1) == labels).sum().item()
    print(f"epoch {epoch}: loss {loss.item():.2f}, right {right} of {len(index)} in training")
