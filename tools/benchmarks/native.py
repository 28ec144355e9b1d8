"""Counterparts of methods and pipelines with DALI's own operators alone, without a stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.auto_aug import auto_augment, rand_augment, trivial_augment
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from pipelines.config import ExecConfig, ImageConfig
from pipelines.files import crop_planned, planned, read_shuffled
from scae_dali.data.index import ImageIndex
from scae_dali.methods.auto_augment import Config as AutoAugmentConfig
from scae_dali.methods.base import DataNode
from scae_dali.methods.policy import PolicyConfig, deprecations_hidden
from scae_dali.methods.rand_augment import Config as RandAugmentConfig
from scae_dali.methods.random_erasing import Config as RandomErasingConfig
from scae_dali.methods.trivial_augment import Config as TrivialAugmentConfig
from scae_dali.plan.random import derive
from scae_dali.stage.images import READER, decode, decoder, normalise, resolve_decode
from scae_dali.stage.stage import Stage
from tools.common.made_up import SEED

__all__ = ["COUNTERPARTS", "augmented_pipeline", "decoded", "plain", "undecoded"]


def erase(images: Any, image: ImageConfig) -> Any:
    """Erase a random rectangle, by DALI's operators alone."""
    erasing = RandomErasingConfig()
    area = fn.random.uniform(range=erasing.area, seed=derive(SEED, "area"))
    aspect = fn.random.uniform(range=erasing.aspect, seed=derive(SEED, "aspect"))
    place = fn.random.uniform(range=(0.0, 1.0), shape=2, seed=derive(SEED, "place"))
    erased = fn.random.coin_flip(probability=erasing.prob, seed=derive(SEED, "erase"))
    shape = fn.stack(math.sqrt(area * aspect), math.sqrt(area / aspect))
    shape = math.min(shape, 1.0) * erased
    return fn.erase(
        images,
        anchor=place * (1.0 - shape),
        shape=shape,
        normalized=True,
        axis_names="HW",
        fill_value=image.mean,
    )


def policy(augment: Callable, config: PolicyConfig, **settings) -> Callable:
    """A policy of auto_aug itself, with the settings of ours."""

    def apply(images: Any, image: ImageConfig) -> Any:
        largest, moved = config.max_translate_rel, {}
        if largest is not None:
            moved = {"shape": (image.size, image.size), "max_translate_rel": largest}
        with deprecations_hidden():
            return augment(images, fill_value=config.fill_value, seed=SEED, **settings, **moved)

    return apply


RAND, AUTO, TRIVIAL = RandAugmentConfig(), AutoAugmentConfig(), TrivialAugmentConfig()
COUNTERPARTS = {
    "random_erasing": erase,
    "rand_augment": policy(
        rand_augment.rand_augment, RAND, n=RAND.n, m=RAND.m, num_magnitude_bins=RAND.bins
    ),
    "auto_augment": policy(auto_augment.auto_augment, AUTO, policy_name=AUTO.policy),
    "trivial_augment": policy(
        trivial_augment.trivial_augment_wide, TRIVIAL, num_magnitude_bins=TRIVIAL.bins
    ),
}


def augmented_pipeline(
    stage: Stage, image: ImageConfig, execution: ExecConfig, augment: Callable
) -> Pipeline:
    """The training pipeline with the method `none` and then `augment`, one of COUNTERPARTS."""

    @pipeline_def(enable_checkpointing=True, enable_conditionals=True, **execution.arguments())
    def define():
        encoded, ids = read_shuffled(stage.index, execution, SEED)
        images, plan = crop_planned(stage, encoded, ids, image, execution)
        images = augment(images, image)
        images = normalise(images, **image.tensor, mirror=plan.part("flip", types.INT32))
        return images, plan.row

    return define()


def read(index: ImageIndex, execution: ExecConfig) -> tuple[DataNode, DataNode]:
    """Encoded files in the order of read_shuffled, and their labels, int32 [1]."""
    return fn.readers.file(
        files=list(index.files),
        labels=index.labels.tolist(),
        file_root=index.root or ".",
        name=READER,
        shuffle_after_epoch=True,
        shuffle_after_epoch_seed=derive(SEED, "order"),
        pad_last_batch=True,
    )


def plain(index: ImageIndex, image: ImageConfig, execution: ExecConfig) -> Iterator[torch.Tensor]:
    """Batches of images without end: DALI's own crop and flip, as in its examples."""
    crop, size = image.crop, (image.size, image.size)
    window = {
        "random_area": list(crop.area),
        "random_aspect_ratio": list(crop.aspect),
        "num_attempts": crop.tries,
        "seed": derive(SEED, "crop"),
    }

    @pipeline_def(**execution.arguments())
    def define():
        encoded, labels = read(index, execution)
        if resolve_decode(image.decode, execution.device_id) == "roi":
            images = fn.decoders.image_random_crop(
                encoded, **decoder(execution.hw_decoder_load), **window
            )
            images = fn.resize(images, size=size)
        else:
            images = fn.random_resized_crop(
                decode(encoded, execution.hw_decoder_load), size=size, **window
            )
        flip = fn.random.coin_flip(probability=crop.flip, seed=derive(SEED, "flip"))
        return normalise(images, **image.tensor, mirror=flip), labels

    batches = DALIGenericIterator(
        [define()],
        ["images", "labels"],
        reader_name=READER,
        last_batch_policy=LastBatchPolicy.PARTIAL,
        auto_reset=True,
    )
    return (out["images"] for _ in itertools.count() for (out,) in batches)


def undecoded(stage: Stage, image: ImageConfig, execution: ExecConfig) -> Iterator[Any]:
    """Batches of plans without end, TensorLists: the part of the training pipeline that the CPU has
    to do if a GPU decodes."""

    @pipeline_def(enable_checkpointing=True, **execution.arguments())
    def define():
        encoded, ids = read_shuffled(stage.index, execution, SEED)
        start, shape, plan = planned(stage, encoded, ids, image)
        where = "cpu" if execution.device_id is None else "gpu"
        pixel = fn.constant(idata=0, shape=(1, 1, 3), dtype=types.UINT8, layout="HWC", device=where)
        plan.partners_mixed = True  # nothing is decoded here, partners neither
        erased = stage.apply(pixel, plan)
        return plan.row, start, shape, plan.part("flip", types.INT32), erased

    return outputs(define())


def decoded(index: ImageIndex, execution: ExecConfig) -> Iterator[Any]:
    """Batches of whole images without end, TensorLists: read and decoded, and no more."""

    @pipeline_def(**execution.arguments())
    def define():
        encoded, labels = read(index, execution)
        return decode(encoded, execution.hw_decoder_load), labels

    return outputs(define())


def outputs(pipeline: Pipeline) -> Iterator[Any]:
    """The first output of the pipeline, batch after batch."""
    pipeline.build()
    return (pipeline.run()[0] for _ in itertools.count())
