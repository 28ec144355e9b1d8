"""The DALI shell: puts a method's plan into a graph.

A `Stage` adds one Python operator on the CPU to a pipeline. It receives ids, the iteration and the
crop windows (never pixels), works the epoch out of the iteration, and returns small arrays that
native operators use. What is planned is the methods' business.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from array_api_compat import array_namespace
from nvidia.dali import Pipeline, fn, types

from scae_dali import crop
from scae_dali.cache import SaliencyCache
from scae_dali.config import IMAGENET_MEAN, IMAGENET_STD, CropConfig
from scae_dali.dataset import ImageIndex
from scae_dali.methods.base import DataNode, Run, Samples, Triple, load, make_config
from scae_dali.rng import Stream, uniforms


class Targets(NamedTuple):
    """What the loss needs, as DALI nodes or tensors: μ·label + (1 - μ)·partner.

    label, partner: int64 [1]. mu: float32 [1]; 1 where the sample is not mixed.
    """

    label: DataNode
    partner: DataNode
    mu: DataNode


@dataclass(frozen=True, kw_only=True)
class PlanNodes:
    """A plan inside a graph. DALI nodes on the CPU, one row a sample.

    id: int64 [1]. start, shape: int32 [2], the crop in pixels of the full frame (None where the
    window was given). flip: int32 [1]. status: int64 [1] of methods.Status. fields: the method's,
    float32.
    """

    targets: Targets
    id: DataNode
    status: DataNode
    fields: Mapping[str, DataNode]
    start: DataNode | None = None
    shape: DataNode | None = None
    flip: DataNode | None = None


class Stage:
    """One augmentation of one data set, ready to be put into a DALI pipeline.

    index: the data set; its order gives the ids. method: see methods.load; its settings are
    further keywords. cache: a SaliencyCache of this index or its path; None: no maps.
    epochs: T of eq. 5. batch_size: the pipeline's. num_shards: the reader's. seed: of all plans.
    start_epoch: the epoch of the pipeline's first batch, where it does not come from a checkpoint.
    mean, std: of the images as the stage gets them; the default is ImageNet's in [0, 255].
    backend: `numpy`, or `torch` on `torch_device` with all maps resident there; the plan is the
    same.

    The reader must pad its shards (`pad_last_batch=True`), so that every epoch has
    `batches_per_epoch` batches; the epoch is computed from that.
    """

    def __init__(
        self,
        index: ImageIndex,
        method: str,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        cache: SaliencyCache | str | None = None,
        num_shards: int = 1,
        start_epoch: int = 0,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        backend: Literal["numpy", "torch"] = "numpy",
        torch_device: str = "cpu",
        **settings: Any,
    ) -> None:
        for name, value in (
            ("epochs", epochs),
            ("batch_size", batch_size),
            ("num_shards", num_shards),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if backend not in ("numpy", "torch"):
            raise ValueError(f"backend must be numpy or torch, got {backend!r}")
        module = load(method)
        if cache is not None and not isinstance(cache, SaliencyCache):
            cache = SaliencyCache(cache, index=index)
        self.index = index
        self.batch_size = batch_size
        self.start_epoch = start_epoch
        self.batches_per_epoch = math.ceil(math.ceil(len(index) / num_shards) / batch_size)
        self._labels_table = index.labels.copy()  # torch shares only arrays that can be written to
        self.seconds = 0.0  # spent in the Python operator, in DALI's thread
        self._run = Run(
            seed=seed,
            epochs=epochs,
            class_counts=index.class_counts,
            mean=mean,
            std=std,
            saliency=_saliency_source(cache, backend, torch_device),
        )
        self._backend = backend
        self._device = torch_device
        self._method = module.Method(make_config(module, settings), self._run)

    def __call__(
        self,
        images: DataNode,
        ids: DataNode,
        window: tuple[DataNode, ...] | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[DataNode, Targets]:
        """Augment images inside a pipeline definition.

        images: HWC, after crop and resize, before flip and normalisation, CPU or GPU.
        ids: int [1], the sample's place in the index, or its name as `source_info` gives it.
        window: (start, size, shapes), the crop in pixels and the shape of the upright image, each
        (y, x)/(h, w) on the CPU; None: the whole image is seen.
        size: (h, w) of the images in pixels; None asks them, which lets the plan wait for them.
        Returns (images, Targets).
        """
        plan = self.plan(ids, window=window, size=images.shape() if size is None else size)
        return self.apply(images, plan), plan.targets

    def plan(
        self,
        ids: DataNode,
        *,
        size: tuple[int, int] | DataNode,
        window: tuple[DataNode, ...] | None = None,
        shapes: DataNode | None = None,
        random_crop: CropConfig | None = None,
    ) -> PlanNodes:
        """Decide for a batch. With `shapes` (of the upright images) the stage draws crop and flip
        itself by `random_crop`, as purely as all else: then a sample's whole augmentation depends
        on nothing but (seed, epoch, id).
        """
        pipeline = Pipeline.current()
        if pipeline is not None and pipeline.max_batch_size != self.batch_size:
            raise ValueError(
                f"batch_size of the stage is {self.batch_size}, of the pipeline "
                f"{pipeline.max_batch_size}; give both the same"
            )
        if (shapes is None) != (random_crop is None):
            raise ValueError("shapes and random_crop go together; give both or neither")
        columns = [_iteration(self.batch_size)]
        if window is not None:
            if len(window) != 3:
                raise ValueError(
                    f"window must be (start, size, shapes), got {len(window)} entries; shapes is "
                    "what fn.peek_image_shape gives"
                )
            columns += [window[0], window[1], window[2][0:2]]
        elif shapes is not None:
            columns.append(shapes[0:2])
        fixed_size = None
        if isinstance(size, tuple):
            fixed_size = size
        else:
            columns.append(size[0:2])
        packed = fn.cat(*(fn.cast(c, dtype=types.FLOAT64) for c in columns))
        decide = _Decide(self, fixed_size, window is not None, random_crop)
        if self._backend == "numpy":
            ints, floats = fn.python_function(
                ids, packed, function=decide.numpy, batch_processing=True, num_outputs=2
            )
        else:
            ints, floats = fn.dl_tensor_python_function(
                ids, packed, function=decide.torch, batch_processing=True, num_outputs=2
            )
        fields, begin = {}, 1
        for name, width in self._method.fields.items():
            fields[name] = floats[begin : begin + width]
            begin += width
        targets = Targets(ints[0:1], ints[1:2], floats[0:1])
        plan = {"targets": targets, "id": ints[2:3], "status": ints[3:4], "fields": fields}
        if random_crop is not None:
            plan["start"] = fn.cast(ints[4:6], dtype=types.INT32)
            plan["shape"] = fn.cast(ints[6:8], dtype=types.INT32)
            plan["flip"] = fn.cast(ints[8], dtype=types.INT32)
        return PlanNodes(**plan)

    def apply(self, images: DataNode, plan: PlanNodes) -> DataNode:
        """Augment images (HWC, CPU or GPU) as planned."""
        return self._method.apply(images, plan.fields)

    def decide(
        self, ids: Any, iteration: Any, window_px: Any, size_px: Any, random_crop: CropConfig | None
    ) -> tuple[Any, Any]:
        """The plan of a batch as two arrays, of the library of `ids` (NumPy or torch).

        ids: int64 [B]. iteration: int64 [B]. window_px: float64 [B, 6], crop and shape of the
        image; [B, 2] shape alone, to draw the crop; None for the whole image. size_px: int64
        [B, 2]. Returns (int64 [B, 4 or 9]: label, partner label, id, status, then crop and flip;
        float64 [B, 1 + …]: μ, then the method's fields).
        """
        xp = array_namespace(ids)
        labels = self._labels(xp, ids)
        epoch = iteration // self.batches_per_epoch + self.start_epoch
        drawn = []
        if random_crop is not None:
            seed = self._run.seed
            u = uniforms(seed, Stream.CROP, epoch, ids, crop.draws_per_sample(random_crop))
            window, flip = crop.crop_and_flip(u, window_px, random_crop)
            drawn = [window, xp.astype(flip, xp.int64)[:, None]]
            window_px = xp.concat([xp.astype(window, xp.float64), window_px], axis=1)
        if window_px is None:
            window = xp.zeros((ids.shape[0], 4), dtype=xp.float64, device=ids.device)
            window[:, 2:] = 1.0
        else:
            full = window_px[:, 4:6]
            window = window_px[:, :4] / xp.concat([full, full], axis=1)
        samples = Samples(ids=ids, labels=labels, epoch=epoch, window=window, size_px=size_px)
        plan = self._method.plan(samples)
        mu = plan.get("mu", xp.ones((ids.shape[0], 1), dtype=xp.float64, device=ids.device))
        partner = plan.get("partner", ids)
        targets = [labels, self._labels(xp, partner), ids, plan["status"]]
        ints = xp.concat([xp.stack(targets, axis=1), *drawn], axis=1)
        return ints, xp.concat([mu, *(plan[name] for name in self._method.fields)], axis=1)

    def _labels(self, xp, ids):
        bad = (ids < 0) | (ids >= len(self.index))
        if xp.any(bad):
            raise IndexError(
                f"ids must be in [0, {len(self.index)}), the places in the index, got "
                f"{int(ids[bad][0])}; let the reader read index.files without labels"
            )
        return xp.asarray(self._labels_table, device=ids.device)[ids]


class SCAE(Stage):
    """The stage of SCAE. Keywords are those of Stage and the fields of ScaeConfig.

    scae = SCAE(index, cache="imagenet.lmdb", epochs=100, batch_size=256, seed=7)
    images, targets = scae(images, ids, window=(start, size, shapes))
    """

    def __init__(self, index: ImageIndex, cache: SaliencyCache | str, **keywords: Any) -> None:
        super().__init__(index, "scae", cache=cache, **keywords)


class _Decide:
    """The Python operator: batches of small arrays in, `Stage.decide`, batches of rows out."""

    def __init__(self, stage, fixed_size, has_window, random_crop):
        self._stage = stage
        self._fixed_size = fixed_size
        self._width = 6 if has_window else 2 if random_crop is not None else 0
        self._random_crop = random_crop

    def numpy(self, ids, packed):
        start = time.perf_counter()
        packed = np.concatenate(packed).reshape(len(packed), -1)
        ints, floats = self._call(self._ids(ids), packed)
        out = list(np.ascontiguousarray(ints)), list(floats.astype(np.float32))
        self._stage.seconds += time.perf_counter() - start
        return out

    def torch(self, ids, packed):
        import torch
        from torch.utils import dlpack

        start = time.perf_counter()
        device = self._stage._device
        ids = self._ids([dlpack.from_dlpack(i).numpy() for i in ids])
        packed = torch.stack([dlpack.from_dlpack(p) for p in packed]).to(device)
        ints, floats = self._call(torch.from_numpy(ids).to(device), packed)
        ints, floats = ints.cpu(), floats.to(torch.float32).cpu()
        out = [dlpack.to_dlpack(i) for i in ints], [dlpack.to_dlpack(f) for f in floats]
        self._stage.seconds += time.perf_counter() - start
        return out

    def _call(self, ids, packed):
        xp = array_namespace(ids)
        iteration = xp.astype(packed[:, 0], xp.int64)
        window_px = packed[:, 1 : 1 + self._width] if self._width else None
        if self._fixed_size is None:
            size_px = xp.astype(packed[:, 1 + self._width :], xp.int64)
        else:
            size_px = xp.asarray([self._fixed_size] * ids.shape[0], device=ids.device)
        return self._stage.decide(ids, iteration, window_px, size_px, self._random_crop)

    def _ids(self, ids):
        if ids[0].dtype == np.uint8:  # names, as source_info gives them
            return self._stage.index.ids_of([bytes(i).decode() for i in ids])
        return np.concatenate([i.reshape(-1) for i in ids]).astype(np.int64)


def _iteration(batch_size):
    """The number of the batch, int64 [1] a sample; a checkpoint of the pipeline restores it."""
    return fn.external_source(
        source=lambda info: np.full((batch_size, 1), info.iteration, np.int64),
        batch=True,
        batch_info=True,
        dtype=types.INT64,
        ndim=1,
    )


def _saliency_source(cache, backend, device):
    """ids -> (maps, found), in the backend's arrays."""
    if cache is None or backend == "numpy":
        return None if cache is None else cache.read
    import torch

    resident = cache.resident()
    tables: dict[str, Any] = {}

    def read(ids):
        if not tables or resident.stale():
            resident.refresh()
            tables["maps"] = torch.from_numpy(resident.maps.copy()).to(device)
            tables["found"] = torch.from_numpy(resident.found.copy()).to(device)
        return tables["maps"][ids], tables["found"][ids]

    return read
