"""The settings that the ready-made pipelines share."""

from dataclasses import dataclass, field, replace
from typing import Any

from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD, check, check_choice
from scae_dali.methods.base import Triple
from scae_dali.plan.crop import CropConfig
from scae_dali.stage.images import HW_DECODER_LOAD, Decode, DTypeName, LayoutName

# With fewer pixels a small network is done before the CPU has launched its next kernels.
BUSY_PIXELS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How images become tensors.

    Args:
        size: Side of the training crop in pixels.
        val_resize: Shorter side of a validation image in pixels before the centre of `size` pixels
            is cut out.
        crop: Random crop and flip of the training images.
        decode: `roi` decodes the crop alone. `full` decodes the whole image and then crops. `auto`
            is `roi`, except on a GPU with nvImageCodec 0.9, whose ROI decoder is reported to crash;
            there it is `full`.
        dtype: Type of the images that the network gets. `fp16` needs amp.
        layout: Memory layout of the images that the network gets.
        mean: Mean of the data set that is subtracted, one grey level in [0, 255] a channel (RGB).
        std: Standard deviation that the images are divided by, in grey levels, one a channel (RGB).
    """

    size: int = 224
    val_resize: int = 256
    crop: CropConfig = field(default_factory=CropConfig)
    decode: Decode = "auto"
    dtype: DTypeName = "fp32"
    layout: LayoutName = "NCHW"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        check(self.size >= 1, f"image.size must be at least 1, got {self.size}")
        check(
            self.val_resize >= self.size,
            f"image.val_resize must be at least image.size ({self.size}), got {self.val_resize}",
        )
        check_choice("image.decode", self.decode, ("auto", "roi", "full"))
        check_choice("image.dtype", self.dtype, ("fp32", "fp16"))
        check_choice("image.layout", self.layout, ("NCHW", "NHWC"))
        check(min(self.std) > 0, f"image.std must be positive, got {self.std}")

    @property
    def tensor(self) -> dict[str, Any]:
        """Keyword arguments of `normalise`."""
        return {name: getattr(self, name) for name in ("mean", "std", "dtype", "layout")}


@dataclass(frozen=True, kw_only=True)
class ExecConfig:
    """Where a pipeline runs, and on how many threads.

    Args:
        batch_size: Images in a batch of one process.
        device_id: Number of the GPU. None runs on the CPU alone.
        threads: DALI's CPU threads in one process.
        prefetch: Batches that DALI prepares ahead.
        shard: The part of every epoch that this process reads, from 0 on.
        num_shards: Number of processes that share an epoch.
        hw_decoder_load: Share of a batch that the GPU's JPEG engine decodes, if the GPU has one.
    """

    batch_size: int
    device_id: int | None = None
    threads: int = 4
    prefetch: int = 3
    shard: int = 0
    num_shards: int = 1
    hw_decoder_load: float = HW_DECODER_LOAD

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        check(self.threads >= 1, f"threads must be at least 1, got {self.threads}")
        check(self.prefetch >= 1, f"prefetch must be at least 1, got {self.prefetch}")
        check(
            0 <= self.shard < self.num_shards,
            f"shard must be in [0, num_shards={self.num_shards}), got {self.shard}",
        )
        check(
            0 <= self.hw_decoder_load <= 1,
            f"hw_decoder_load must be in [0, 1], got {self.hw_decoder_load}",
        )

    def for_inference(self, size: int) -> "ExecConfig":
        """A copy with batches of at least BUSY_PIXELS on a GPU. size: an image's side in pixels."""
        least = 1 if self.device_id is None else BUSY_PIXELS // size**2
        return replace(self, batch_size=max(self.batch_size, least))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a @pipeline_def function."""
        return {
            "batch_size": self.batch_size,
            "num_threads": self.threads,
            "device_id": self.device_id,
            "prefetch_queue_depth": self.prefetch,
        }
