"""Images in memory: an index and the pixels of its samples, from CIFAR's files or decoded once.

It pays for small images, where opening a file costs more than decoding it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, pipeline_def

from scae_dali.data.broken import check_regular, concerns_images, explain
from scae_dali.data.index import DatasetError, ImageIndex

__all__ = ["ArrayImages"]

UInt8 = npt.NDArray[np.uint8]
CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # torchvision's names
BATCH = 64  # images decoded at once; more are no faster


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Sample i of `index` is `pixels[i]`; the index's files are names, which nothing opens.

    pixels: uint8 [N, H, W, 3], upright RGB, C-contiguous; kept as a read-only view of what is
    given. Raises DatasetError.
    """

    index: ImageIndex
    pixels: UInt8

    def __post_init__(self) -> None:
        pixels = self.pixels
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            raise DatasetError(
                f"pixels must be a NumPy array of uint8, got "
                f"{getattr(pixels, 'dtype', type(pixels).__name__)}; scale to 0 … 255 and cast"
            )
        if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
            raise DatasetError(
                f"pixels must have the shape [N, H, W, 3], got {pixels.shape}; transpose channels "
                f"to the end, and repeat grey ones three times"
            )
        if len(pixels) != len(self.index):
            raise DatasetError(
                f"pixels holds {len(pixels)} images, index {len(self.index)} samples; subset both"
            )
        if not pixels.flags.c_contiguous:
            raise DatasetError(
                f"pixels must be C-contiguous, got strides {pixels.strides}; np.ascontiguousarray "
                f"copies them so"
            )
        view = pixels.view()
        view.setflags(write=False)
        object.__setattr__(self, "pixels", view)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        h, w = self.pixels.shape[1:3]
        return f"ArrayImages({len(self)} samples of {h} x {w}, {self.index.num_classes} classes)"

    def subset(self, ids: npt.ArrayLike) -> ArrayImages:
        """The samples at `ids` (int [M]), in that order, copied. Raises DatasetError."""
        index = self.index.subset(ids)
        return ArrayImages(index, self.pixels[np.asarray(ids)])

    @classmethod
    def from_cifar(cls, root: str | os.PathLike[str], name: str, *, train: bool) -> ArrayImages:
        """CIFAR in its native order, from the files that torchvision downloads into `root`.

        name: "cifar10" or "cifar100" (fine labels). train: False: the test images. Sample 17 of the
        training images is named train/00017, whatever subset it ends up in. Raises DatasetError.
        """
        from torchvision import datasets  # slow to import, and folders do without

        if name not in CIFAR:
            raise DatasetError(f"name must be one of {', '.join(CIFAR)}; got {name!r}")
        kind = getattr(datasets, CIFAR[name])
        try:
            with warnings.catch_warnings():
                # NumPy 2.4.0-2.4.4 on pickles as old as these.
                warnings.filterwarnings("ignore", r"dtype\(\): align should be passed")
                data = kind(os.fspath(root), train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise DatasetError(
                f"root={os.fspath(root)!r} lacks {kind.base_folder}/, or its files are not those "
                f"published ({error}); download them with torchvision.datasets.{kind.__name__}"
                f"({os.fspath(root)!r}, download=True), or name the folder that holds "
                f"{kind.base_folder}/"
            ) from error
        split = "train" if train else "test"
        names = [f"{split}/{i:05d}" for i in range(len(data.targets))]
        index = ImageIndex.from_arrays(names, data.targets, classes=data.classes)
        return cls(index, np.ascontiguousarray(data.data))

    @classmethod
    def from_index(cls, index: ImageIndex, *, threads: int = 4) -> ArrayImages:
        """Every image of the index, decoded by DALI on the CPU; all must have one size.

        CIFAR's images in folders are sorted by name, not in the native order: a long-tailed subset
        of them has the published profile, but not the published samples. Raises DatasetError that
        names the file which has another size, does not decode, or is no file.
        """
        check_regular(index, float("inf"))
        try:
            return cls(index, _decode(index, threads))
        except RuntimeError as error:
            if not concerns_images(str(error)):
                raise
            raise DatasetError(explain(str(error), index)) from error


def _decode(index: ImageIndex, threads: int) -> UInt8:
    """uint8 [N, H, W, 3], in the order of the index."""
    batch_size = min(BATCH, len(index))

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None)
    def define():
        if index.archives is None:
            encoded, _ = fn.readers.file(files=list(index.files), file_root=index.root or ".")
        else:
            encoded = fn.external_source(source=batch, batch=True, batch_info=True)
        return fn.decoders.image(encoded, device="cpu")

    def batch(info):
        ids = np.arange(info.iteration * batch_size, (info.iteration + 1) * batch_size)
        return index.read((ids % len(index)).tolist())

    pipeline = define()
    pixels = np.empty((0, 0, 0, 3), dtype=np.uint8)
    for start in range(0, len(index), batch_size):
        (images,) = pipeline.run()
        shapes = [tuple(shape) for shape in images.shape()]
        if start == 0:
            pixels = _allocate((len(index), *shapes[0]))
        stop = min(start + batch_size, len(index))
        for i, shape in zip(range(start, stop), shapes, strict=False):
            if shape != pixels.shape[1:]:
                (h, w, _), (height, width) = shape, pixels.shape[1:3]
                raise DatasetError(
                    f"{os.path.join(index.root, index.files[i])!r} has {h} x {w} pixels (height x "
                    f"width), {index.files[0]!r} {height} x {width}: in memory all must have one "
                    f"size; resize the files, or read them from disk (train.py: without "
                    f"--data.in_memory)"
                )
        pixels[start:stop] = images.as_array()[: stop - start]  # the last batch wraps around
    return pixels


def _allocate(shape: tuple[int, ...]) -> UInt8:
    try:
        return np.empty(shape, dtype=np.uint8)
    except MemoryError as error:
        raise DatasetError(
            f"{shape[0]} images of {shape[1]} x {shape[2]} pixels do not fit in memory ({error}); "
            f"read them from disk (train.py: without --data.in_memory)"
        ) from error


def index_of(images: ImageIndex | ArrayImages) -> ImageIndex:
    """The list of images that are files, or in memory."""
    return images.index if isinstance(images, ArrayImages) else images
