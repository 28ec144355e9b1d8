"""A small network, its images, and what a saliency pass or a harvest over them takes."""

import numpy as np
import torch
from conftest import batch_of
from torch import nn

from scae_dali.data.index import ImageIndex
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.whole import whole_loader

SIZE, GRID = 28, (7, 7)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def loaders(index, asked, batch_size=16):
    def loader_for(ids):
        asked.append(list(ids))
        return whole_loader(index, ids, size=28, batch_size=batch_size, threads=2)

    return loader_for


def batches(index: ImageIndex, size: int = 7, batch_size: int = 64):
    """loader_for of refresh, of random images."""

    def loader_for(ids):
        for start in range(0, len(ids), batch_size):
            some = torch.as_tensor(np.array(ids[start : start + batch_size]))
            n = len(some)
            labels = torch.from_numpy(index.labels[some])
            images = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
            yield batch_of(images, labels, some)

    return loader_for


class Here:
    """Ranks of one process."""

    rank = local = node = 0
    world, first = 1, True
    device = torch.device("cpu")

    def gather(self, value):
        return [value]


def harvest_of(net, samples=50, classes=3, layer="features", **more):
    settings = {"samples": samples, "num_classes": classes, "grid": GRID, "size": SIZE} | more
    return Harvest(net, layer, **settings)


def pictures(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, SIZE, SIZE, generator=generator), torch.arange(n) % 3


def see(net, harvest, batch):
    net(batch.images)
    harvest.add(batch)
