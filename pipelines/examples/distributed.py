"""SCAE on several GPUs and nodes; it saves and ends when a scheduler says that time is up.

    torchrun --nproc-per-node 2 pipelines/examples/distributed.py --data demo/data --out demo/two

On two nodes, type the next command on both. HOST is the name of one of them.

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        pipelines/examples/distributed.py --data /data/imagenet --out run

All nodes must see the folder `--out`. If one process gets the signal SIGUSR1, all of them save a
checkpoint after their step, and end. The same command, with as many processes, goes on from there.
distributed.sbatch does all of this under SLURM.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
import torchvision
from nvidia.dali import fn, pipeline_def
from torch import distributed

import scae_dali

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, required=True, help="folder that holds train/")
parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and maps")
parser.add_argument("--epochs", type=int, default=4, help="3 or more: maps are made before epoch 2")
args = parser.parse_args()
if args.epochs < 3:
    parser.error(f"--epochs must be 3 or more, got {args.epochs}: maps are made before epoch 2")
known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
if lacking := [name for name in known if name not in os.environ]:
    parser.error(f"{', '.join(lacking)} must be set: start this by torchrun, which does so")
args.out.mkdir(parents=True, exist_ok=True)
checkpoint = args.out / "checkpoint.pt"

BATCH, SIDE = 16, 64  # BATCH is that of one process
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet, in 0 … 255
rank, world, local, node = (int(os.environ[name]) for name in known)
gpu = torch.cuda.is_available()
device_id = local if gpu else None
device, decoder = (torch.device("cuda", local), "mixed") if gpu else (torch.device("cpu"), "cpu")
if gpu:
    torch.cuda.set_device(local)
distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")

told = torch.zeros(1)
signal.signal(signal.SIGUSR1, lambda number, frame: told.fill_(1))

index = scae_dali.ImageIndex(args.data / "train")
maps = args.out / f"maps-of-node-{node}.lmdb"  # each node has a cache of its own
scae = scae_dali.SCAE(
    index, maps, epochs=args.epochs, batch_size=BATCH, seed=7, refresh_every=2, num_shards=world
)
run = {"batch_size": BATCH, "num_threads": 4, "device_id": device_id}


@pipeline_def(**run, enable_checkpointing=True, enable_conditionals=scae.conditional)
def train():
    jpegs, ids = fn.readers.file(
        files=list(index.files), file_root=index.root, num_shards=world, shard_id=rank,
        name="Reader", shuffle_after_epoch=True, pad_last_batch=True,
    )  # fmt: skip
    shapes = fn.peek_image_shape(jpegs)
    start, size = fn.random_crop_generator(shapes, seed=1 + rank)
    images = fn.decoders.image_slice(jpegs, start, size, axis_names="HW", device=decoder)
    images = fn.resize(images, size=(SIDE, SIDE))
    images, targets = scae(images, ids, window=(start, size, shapes), size=(SIDE, SIDE))
    flip = fn.random.coin_flip(seed=1001 + rank)
    return fn.crop_mirror_normalize(images, mirror=flip, mean=MEAN, std=STD), *targets


# drop_last: all processes take the same number of steps.
loader = scae_dali.Loader(train(), ["images", *scae.outputs], index, drop_last=True)
torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=index.num_classes).to(device)
model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[local] if gpu else None)
optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)


def save():
    """Write one file with what all processes share, and the states of each of them."""
    ranks: list = [None] * world
    distributed.all_gather_object(ranks, (loader.state_dict(), scae.state_dict()))
    shared = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
    if rank == 0:
        torch.save({**shared, "ranks": ranks}, args.out / "new.pt")
        (args.out / "new.pt").replace(checkpoint)


if checkpoint.exists():
    saved = torch.load(checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    of_loader, of_scae = saved["ranks"][rank]
    loader.load_state_dict(of_loader)
    scae.load_state_dict(of_scae)

steps, stop = 0, told
for epoch in range(loader.epoch, args.epochs):
    scae.refresh(model, epoch, size=2 * SIDE)
    for batch in loader:
        logits = model(batch.images)
        loss = scae_dali.mixed_cross_entropy(logits, batch.labels, batch.partners, batch.mu)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
        stop = told.clone()  # the signal may come at any time; `stop` is the same in all processes
        distributed.all_reduce(stop, distributed.ReduceOp.MAX)
        if stop:
            break
    save()
    if stop:
        break
    if rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.2f}", flush=True)

if rank == 0:
    print(f"{steps} steps; to be started again" if stop else f"{steps} steps; finished", flush=True)
    if not stop:
        torch.save(model.module.state_dict(), args.out / "weights.pt")
distributed.barrier()
distributed.destroy_process_group()
