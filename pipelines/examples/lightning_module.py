"""SCAE under Lightning's Trainer, with checkpoints in the middle of an epoch too.

    python pipelines/examples/lightning_module.py --data demo/data --out demo/lightning

Started again, the same command goes on after its last checkpoint. Needs `pip install lightning`.
"""

import argparse
from pathlib import Path

import lightning
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from nvidia.dali import fn, pipeline_def

import scae_dali

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, required=True, help="folder that holds train/ and val/")
parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and maps")
parser.add_argument("--epochs", type=int, default=4, help="3 or more: maps are made before epoch 2")
parser.add_argument("--save-every", type=int, default=10, help="steps between two checkpoints")
args = parser.parse_args()
if args.epochs < 3:
    parser.error(f"--epochs must be 3 or more, got {args.epochs}: maps are made before epoch 2")

BATCH, SIDE = 32, 64
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet, in 0 … 255
device_id = 0 if torch.cuda.is_available() else None
decoder = "cpu" if device_id is None else "mixed"

index = scae_dali.ImageIndex(args.data / "train")
scae = scae_dali.SCAE(
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


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=index.num_classes)

    def on_train_epoch_start(self):
        scae.refresh(self.model, self.current_epoch, size=2 * SIDE)

    def training_step(self, batch, step):
        logits = self.model(batch.images)
        return scae_dali.mixed_cross_entropy(logits, batch.labels, batch.partners, batch.mu)

    def validation_step(self, batch, step):
        right = (self.model(batch.images).argmax(1) == batch.labels).float()
        self.log("accuracy", right.mean(), prog_bar=True, batch_size=len(right))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

    def on_save_checkpoint(self, checkpoint):  # Lightning itself saves the state of the loader
        checkpoint["scae"] = scae.state_dict()

    def on_load_checkpoint(self, checkpoint):
        scae.load_state_dict(checkpoint["scae"])


loader = scae_dali.Loader(train(), ["images", *scae.outputs], index, drop_last=True)
val_index = scae_dali.ImageIndex(args.data / "val")
val = scae_dali.whole_loader(
    val_index, size=SIDE, resize=SIDE * 8 // 7, batch_size=BATCH, device_id=device_id
)
saving = ModelCheckpoint(args.out, save_last=True, every_n_train_steps=args.save_every)
trainer = lightning.Trainer(
    accelerator="cpu" if device_id is None else "gpu",
    devices=1,
    max_epochs=args.epochs,
    callbacks=[saving],
    logger=False,
)
last = args.out / "last.ckpt"
trainer.fit(Classifier(), loader, val, ckpt_path=last if last.exists() else None)
print(f"{trainer.global_step} steps in {trainer.current_epoch} epochs")
