"""The pipeline's recipe in torchvision alone: what a user would take instead of DALI."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision import io
from torchvision.transforms import v2

import _path  # noqa: F401
from pipelines.config import ImageConfig
from scae_dali.config import RandomErasingConfig
from scae_dali.dataset import ImageIndex

__all__ = ["AHEAD", "COUNTERPARTS", "DECODERS", "endless"]

AHEAD = 2  # batches that each worker prepares


class Files(Dataset):
    """The same files and recipe by torchvision alone."""

    def __init__(self, index: ImageIndex, image: ImageConfig, decoder: str, method: str) -> None:
        self._paths = [os.path.join(index.root, name) for name in index.files]
        self._labels = index.labels
        self._decode = DECODERS[decoder]
        dtype = torch.float32 if image.dtype == "fp32" else torch.float16
        before, after = COUNTERPARTS.get(method, ([], []))
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(
                    image.size, image.crop.area, image.crop.aspect, antialias=True
                ),
                v2.RandomHorizontalFlip(image.crop.flip),
                *before,
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([m / 255 for m in image.mean], [s / 255 for s in image.std]),
                *after,
                v2.ToDtype(dtype),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._decode(self._paths[i])), int(self._labels[i])


# By method: torchvision's transforms of the pixels, before and after the normalisation.
COUNTERPARTS: dict[str, tuple[list[nn.Module], list[nn.Module]]] = {
    "random_erasing": ([], [v2.RandomErasing(RandomErasingConfig().prob)]),
    "rand_augment": ([v2.RandAugment()], []),
    "auto_augment": ([v2.AutoAugment()], []),
    "trivial_augment": ([v2.TrivialAugmentWide()], []),
    "mixup": ([], []),
    "cutmix": ([], []),
}


class Mixed:
    """Collates a batch and mixes it."""

    def __init__(self, mix: v2.MixUp | v2.CutMix) -> None:
        self._mix = mix

    def __call__(self, samples: list) -> tuple[torch.Tensor, torch.Tensor]:
        return self._mix(*default_collate(samples))


def decode_pil(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def decode_torchvision(path: str) -> torch.Tensor:
    return io.decode_image(path, mode=io.ImageReadMode.RGB)


# By row: what ImageFolder does unless told otherwise, and torchvision's own decoder.
DECODERS: dict[str, Callable] = {"torchvision": decode_pil}
if hasattr(io, "decode_image"):
    DECODERS["torchvision (decode_image)"] = decode_torchvision
    # From 0.29 on it says that it will go; here it is one of two, for as long as it is there.
    warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)


def endless(
    index: ImageIndex,
    image: ImageConfig,
    *,
    method: str,
    decoder: str,
    batch_size: int,
    workers: int,
    device: str,
) -> Iterator[torch.Tensor]:
    """Batches of images on `device`, shuffled, without end, by the counterpart of a method."""
    files = Files(index, image, decoder, method)
    mixing = {"mixup": v2.MixUp, "cutmix": v2.CutMix}.get(method)
    loader = DataLoader(
        files,
        batch_size,
        sampler=RandomSampler(files, num_samples=1 << 40),
        collate_fn=Mixed(mixing(num_classes=index.num_classes)) if mixing else None,
        num_workers=workers,
        prefetch_factor=AHEAD,
        pin_memory=device != "cpu",
        multiprocessing_context="spawn",  # DALI's threads would not survive a fork
    )
    layout = torch.channels_last if image.layout == "NHWC" else torch.contiguous_format
    for images, _ in loader:
        yield images.to(device, memory_format=layout, non_blocking=True)
