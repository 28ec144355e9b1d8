"""The training pipeline's counterparts in torchvision and timm: what a user has instead of DALI."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision import io
from torchvision.transforms import v2

from pipelines.config import ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.methods.random_erasing import Config as RandomErasingConfig

__all__ = ["AHEAD", "BY_TIMM", "BY_TORCHVISION", "DECODERS", "has_timm", "timm", "torchvision"]

AHEAD = 2  # batches that each worker prepares, the default of both


class Files(Dataset):
    """The same files and augmentation, by torchvision alone."""

    def __init__(self, index: ImageIndex, image: ImageConfig, decoder: str, method: str) -> None:
        self._paths = [os.path.join(index.root, name) for name in index.files]
        self._labels = index.labels
        self._decode = DECODERS[decoder]
        dtype = torch.float32 if image.dtype == "fp32" else torch.float16
        before, after = BY_TORCHVISION[method]
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


# Method -> torchvision's transforms of the pixels, before and after the normalisation.
BY_TORCHVISION: dict[str, tuple[list[nn.Module], list[nn.Module]]] = {
    "none": ([], []),
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


# Row -> decoder: ImageFolder's default, and torchvision's own.
DECODERS: dict[str, Callable] = {"torchvision": decode_pil}
if hasattr(io, "decode_image"):
    DECODERS["torchvision (decode_image)"] = decode_torchvision
    # It is deprecated from 0.29 on.
    warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)


def torchvision(
    index: ImageIndex,
    image: ImageConfig,
    *,
    method: str,
    batch_size: int,
    workers: int,
    device: str,
    decoder: str = "torchvision",
) -> Iterator[torch.Tensor]:
    """Batches of images on `device`, shuffled, without end, by torchvision's counterpart of a
    method."""
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
        multiprocessing_context=_workers(),
    )
    for images, _ in loader:
        yield images.to(device, memory_format=memory_format(image), non_blocking=True)


def _workers() -> Any:
    """How workers start: forked from a process without DALI's threads, which a fork would break,
    and with all imports done, which would take each worker seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tools.benchmarks.peers", *(["timm.data"] if has_timm() else [])]
    )
    return context


# Method -> timm's probability of erasing.
BY_TIMM = {"none": 0.0, "random_erasing": RandomErasingConfig().prob}


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


class Reader:
    """The files of an index as timm's ImageDataset reads them."""

    def __init__(self, index: ImageIndex) -> None:
        self._paths = [os.path.join(index.root, name) for name in index.files]
        self._labels = index.labels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[BinaryIO, int]:
        return open(self._paths[i], "rb"), int(self._labels[i])  # ImageDataset reads it once


def timm(
    index: ImageIndex,
    image: ImageConfig,
    *,
    method: str,
    batch_size: int,
    workers: int,
    device: str,
) -> Iterator[torch.Tensor]:
    """Batches of images on `device`, shuffled, without end, by timm's loader.

    On a GPU it is set up as in timm's train.py: workers give uint8, and the prefetcher normalises
    and erases on the device. On the CPU there is no prefetcher (--no-prefetcher): the workers do
    its work, which is faster. Like the other rows it is bilinear, without colour jitter, and fills
    with the mean. The loader of several epochs keeps the workers busy between epochs.
    """
    from timm.data import ImageDataset, create_loader

    _workers()
    torch.multiprocessing.set_start_method("forkserver", force=True)  # its loader has no option
    dtype = torch.float32 if image.dtype == "fp32" else torch.float16
    loader = create_loader(
        ImageDataset("", reader=Reader(index)),
        input_size=(3, image.size, image.size),
        batch_size=batch_size,
        is_training=True,
        re_prob=BY_TIMM[method],
        scale=image.crop.area,
        ratio=image.crop.aspect,
        hflip=image.crop.flip,
        color_jitter=None,  # type: ignore[arg-type]  # leaves it out, as its create_transform says
        interpolation="bilinear",
        mean=tuple(m / 255 for m in image.mean),
        std=tuple(s / 255 for s in image.std),
        num_workers=workers,
        pin_memory=device != "cpu",
        img_dtype=dtype,
        device=torch.device(device),
        use_prefetcher=device != "cpu",
        use_multi_epochs_loader=True,
    )
    for _ in itertools.count():
        for images, _ in loader:
            yield images.to(dtype, memory_format=memory_format(image))


def memory_format(image: ImageConfig) -> torch.memory_format:
    return torch.channels_last if image.layout == "NHWC" else torch.contiguous_format
