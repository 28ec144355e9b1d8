"""An augmentation inside a DALI pipeline: `Stage`, which users call, and what it gives them.

A stage adds one Python operator on the CPU to a pipeline (`Operator`). It receives ids, the number
of the batch and the crop windows, never pixels, and returns a small table, a row a sample
(`Planner`). DALI's own operators read the table and change the pixels.
"""

import operator
import os
import warnings
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from nvidia.dali import Pipeline, data_node, fn, types
from nvidia.dali.pipeline import do_not_convert

from scae_dali.cache import CacheError, SaliencyCache
from scae_dali.cache.format import check_last_pass, check_neighbors
from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD, check_seed
from scae_dali.data.index import ImageIndex
from scae_dali.methods import base, compose, paste
from scae_dali.methods.base import NO_PARTNERS, DataNode, Run, Status, Triple
from scae_dali.plan import schedule
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import batches_per_epoch
from scae_dali.stage import partner, wiring
from scae_dali.stage.dynamic import Dynamic
from scae_dali.stage.lookup import Lookup
from scae_dali.stage.operator import Operator
from scae_dali.stage.table import Planner

_AHEAD = 64  # batches; DALI and the workers of a loader prepare fewer in advance


class Targets(NamedTuple):
    """What the loss needs, as DALI nodes: μ·label + (1 - μ)·partner.

    label, partner: int64 [1]. mu: float32 [1]; 1 where the sample is not mixed.
    """

    label: DataNode
    partner: DataNode
    mu: DataNode


class PlanNodes:
    """The plan of a batch inside a graph: its rows, and its columns by name, as DALI nodes.

    row: float64 [K] a sample, on the CPU. single: the same in float32. planner: says which columns
    a row has. partners_mixed: whether the planned partners have been mixed into the images, or will
    be, by paste_partners. partners: where the method pastes, a function that gives the partners'
    crops and the settled rows of the plan (see Planner.settle); it is called for the mixed samples
    alone. transform_partners: what a policy does to these crops; None: nothing.

    A part is cut out of the row when it is asked for, and a pipeline had better give out the whole
    row, which `Loader` takes apart: DALI hands every sample of every operator on the CPU to its
    threads, and that costs more than the operator, the more so the more threads there are.
    """

    partners: Any = None  # () -> (DataNode, DataNode)
    transform_partners: Any = None  # (DataNode, PlanNodes) -> DataNode

    def __init__(self, row: DataNode, single: DataNode, planner: Planner) -> None:
        self.row = row
        self.planner = planner
        self.partners_mixed = False
        self._single = single

    def part(self, name: str, dtype: types.DALIDataType, within: slice = slice(None)) -> DataNode:
        """The columns of this name, or some of them: [width] a sample."""
        whole = self.planner.columns[name]
        begin, end, _ = within.indices(whole.stop - whole.start)
        return self._cut(slice(whole.start + begin, whole.start + end), dtype)

    def scalar(self, name: str, dtype: types.DALIDataType) -> DataNode:
        """A column of width 1, as a scalar."""
        return self._cut(self.planner.columns[name].start, dtype)

    def fill_boxes(self, images: DataNode, value: Triple) -> bool:
        """Have the boxes of these images filled with value, a grey level a channel, where the
        images are made. Returns whether they will be; if not, the caller fills them in the graph.
        """
        return False

    @property
    def mixed(self) -> DataNode:
        """Whether a sample is mixed with a partner, as a scalar."""
        mixed = int(Status.MIXED | Status.MIXED_IN_BATCH)
        return (self.scalar("status", types.INT32) & mixed) > 0

    def paste_partners(self, name: str, images: DataNode) -> DataNode:
        """Paste boxes of the partners into images. The rows are settled from then on. name: of the
        boxes' fields, see methods.paste."""
        row = self.row
        if self.mixed:
            others, row = self.partners()
            settled = PlanNodes(row, fn.cast(row, dtype=types.FLOAT), self.planner)
            if self.transform_partners is not None:
                # A batch without partners has no layout behind a GPU decoder, see partner.Fetch.
                others = fn.reshape(others, layout="HWC")
                others = self.transform_partners(others, settled)
            images = paste.paste(name, images, fn.cast_like(others, images), settled)
        self.row, self._single = row, fn.cast(row, dtype=types.FLOAT)
        return images

    def _cut(self, columns: slice | int, dtype: types.DALIDataType) -> DataNode:
        if dtype == types.FLOAT:
            return self._single[columns]
        return fn.cast(self.row[columns], dtype=dtype)

    @property
    def id(self) -> DataNode:
        """int64 [1], the sample's place in the index."""
        return self.part("id", types.INT64)

    @property
    def targets(self) -> Targets:
        """Both labels and their weight."""
        return Targets(
            self.part("label", types.INT64),
            self.part("partner", types.INT64),
            self.part("mu", types.FLOAT),
        )


class Stage:
    """An augmentation of one data set, ready to be put into a DALI pipeline.

    Call it where the pipeline is defined: images, targets = stage(images, ids, window=…). Pipelines
    that mix or crop in ways of their own call `plan` and `apply` instead.

    index: the data set; its order gives the ids.
    method: one of methods.BUILT_IN, or the dotted name of a module of your own. Several are joined
    by +, as in `rand_augment+scae`. Two can be joined by |, as in `mixup|cutmix`: each batch takes
    one of them. See methods.compose.
    settings: the fields of the method's Config. Of several methods a mapping for each under its
    name, as in scae={"lam_max": 1.0}. A ready Config goes under the method's name too.
    `switch_prob` is the probability that a batch takes the second of two joined by |.
    cache: a SaliencyCache of this index, or its path; None: there are no maps. At the path there
    may be nothing yet if a pass is due within the run: then no sample has a map until `attach`.
    epochs: how many the run has, T of eq. 5. batch_size: of the pipeline. num_shards: of the
    reader. seed: of everything that is planned.
    epoch_size: how many samples an epoch has, in all shards together; None: every sample once.
    start_epoch: the epoch of the pipeline's first batch, if it is not restored from a checkpoint.
    mean, std: of the images as the stage gets them; the default is ImageNet's, in [0, 255].
    backend: the DALI operator that runs the plan, `python` (fn.python_function; `numpy` is another
    name for it) or `torch` (fn.dl_tensor_python_function). The plan is the same, and runs on the
    CPU. torch_device: `cpu` or None.
    resident: True keeps all maps in memory, h·w bytes a sample in every process and for every
    stage, and takes them anew after each pass. False looks them up in the cache. None keeps them
    where they take at most RESIDENT_BYTES. The plan is the same.

    The reader must pad its shards (`pad_last_batch=True`): the epoch is computed from the number of
    the batch, so every epoch must have `batches_per_epoch` batches.

    mixes: whether the method mixes in partners, which the pipeline fetches. conditional:
    whether the pipeline must be defined with `enable_conditionals=True`. moves_pixels: whether the
    method moves pixels elsewhere than window and flip say. seconds: spent on plans so far.
    """

    def __init__(
        self,
        index: ImageIndex,
        method: str,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        cache: SaliencyCache | str | os.PathLike[str] | None = None,
        num_shards: int = 1,
        epoch_size: int | None = None,
        start_epoch: int = 0,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        backend: Literal["python", "torch", "numpy"] = "python",
        torch_device: str | None = None,
        resident: bool | None = None,
        **settings: Any,
    ) -> None:
        for name, value in (
            ("epochs", epochs),
            ("batch_size", batch_size),
            ("num_shards", num_shards),
            ("epoch_size", epoch_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_seed(seed)
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be at least 0, got {start_epoch}")
        if backend not in ("python", "torch", "numpy"):
            raise ValueError(f"backend must be python or torch, got {backend!r}")
        if str(torch_device or "cpu") != "cpu":
            raise ValueError(
                f"torch_device must be cpu, got {torch_device!r}: the plan runs on the CPU, "
                "whatever the backend; leave it out"
            )
        configs = compose.configs(method, settings)
        self._lookup = None if cache is None else Lookup(index, cache, resident)
        self._refresh_every = max(getattr(one, "refresh_every", 0) for one in configs.values())
        comes = schedule.pass_epoch(epochs - 1, self._refresh_every) is not None
        if self._lookup is not None and self._lookup.cache is None and not comes:
            raise CacheError(
                f"there is no saliency cache at {self._lookup.path!r}, and no saliency pass makes "
                f"one with epochs={epochs} and refresh_every={self._refresh_every}: build it by "
                "`scae-dali build-cache`, or let refresh_every be less than epochs"
            )
        self.index = index
        self.batch_size = batch_size
        self.start_epoch = start_epoch
        self.num_shards = num_shards
        self.epoch_size = len(index) if epoch_size is None else epoch_size
        self.batches_per_epoch = batches_per_epoch(self.epoch_size, batch_size, num_shards)
        self._dynamic: Dynamic | None = None  # until it is called
        self._trained = 0  # the epoch that the user has begun, as `refresh` is told
        self._told_of_earlier = False
        self.seconds = 0.0  # spent in the Python operator, in DALI's thread
        self.size: tuple[int, int] | None = None  # (h, w) of the images, once a pipeline tells it
        self._in_batch: bool | None = None  # whether partners are of the batch; None: not known yet
        self._by_torch = backend == "torch"
        self._run = Run(
            seed=seed,
            epochs=epochs,
            labels=index.labels,
            class_counts=index.class_counts,
            mean=mean,
            std=std,
            saliency=None if self._lookup is None else self._lookup.maps,
            neighbors=None if self._lookup is None else self._lookup.neighbors,
        )
        self._guided = bool(compose.guided(configs))
        asked = [
            one.neighbors_for(index.class_counts)
            for one in configs.values()
            if isinstance(one, base.Config)
        ]
        self._neighbors = max(asked, default=0)
        self._method = compose.make(configs, self._run)
        self.mixes = self._method.mixes
        if self._lookup is not None:
            for config in compose.guided(configs):
                check_neighbors(config.neighbors_for(index.class_counts), index.num_classes)
                check_last_pass(epochs, config.refresh_every)
                opened = self._lookup.cache
                if opened is not None and opened is not cache:  # whoever opens it looks at it
                    _look_at(opened, len(index), config.refresh_every)
        self.moves_pixels = self._method.moves_pixels
        self.conditional = self.mixes or self._method.conditional

    def __call__(
        self,
        images: DataNode,
        ids: DataNode,
        window: tuple[DataNode, DataNode, DataNode] | None = None,
        size: tuple[int, int] | None = None,
        partner_crop: CropConfig = CropConfig(),  # noqa: B008 - frozen
        *,
        epoch: DataNode | int | None = None,
    ) -> tuple[DataNode, Targets]:
        """Augment images inside a pipeline definition.

        images: HWC, after crop and resize, before flip and normalisation, CPU or GPU.
        ids: int [1], the sample's place in the index, or its name as `source_info` gives it.
        window: the crop in pixels of the upright image, (start, size, shapes): its (y, x), its
        (h, w), and the shape of the upright image; all on the CPU. None: the whole image is seen.
        size: (h, w) of the images in pixels. None asks the images, so the plan waits for them.
        partner_crop: how partners, which are images of the index, are cropped. Only CMO, and SCAE
        with tail classes, fetch any. Then `enable_conditionals=True` must be set in the pipeline.
        If the index's images cannot be read, partners are taken from the batch, as they are there,
        and a warning says so.
        epoch: int [1] a sample, on the CPU, or one number, from 0 on, where you count the epochs
        yourself. Then batches and epochs may have any size and order, and the stage adds no source
        of its own to the pipeline. None: the stage counts batches.
        Returns (images, Targets).

        Raises ValueError where the graph shows that something is wired wrongly: ids that are no
        ids, images that are not as above, or a window or size of other images. See `wiring`.
        """
        size = wiring.checked_size(size)
        wiring.check_sources(images, ids, window)
        if window is not None:
            wiring.check_window(window)
        known = wiring.check_images(
            images,
            window=window,
            size=size,
            run=self._run,
            guided=self._lookup is not None,
            fills=self.mixes or "erase" in self._method.kinds,
        )
        plan = self.plan(
            ids,
            window=window,
            size=images.shape() if size is None or not known else size,
            told=size,
            epoch=epoch,
        )
        if self.mixes:
            if not self._run.grey_levels:
                raise ValueError(
                    "mean must be in grey levels where partners are fetched, because they are in "
                    f"[0, 255], got {self._run.mean}; call the stage before the normalisation, or "
                    f"{NO_PARTNERS}"
                )
            side = fn.cast(images.shape()[:2], dtype=types.FLOAT) if size is None else size
            fetch = partial(partner.decode_crop, size=side, crop=partner_crop, device=images.device)
            with base.branches_explained():
                images = partner.mix(images, plan, partner_crop, fetch)
        return self.apply(images, plan), plan.targets

    def plan(
        self,
        ids: DataNode,
        *,
        size: tuple[int, int] | DataNode,
        window: tuple[DataNode, DataNode, DataNode] | None = None,
        shapes: DataNode | None = None,
        random_crop: CropConfig | None = None,
        keyed: bool = False,
        told: tuple[int, int] | None = None,
        epoch: DataNode | int | None = None,
    ) -> PlanNodes:
        """Decide for a batch, inside a pipeline definition.

        ids, window, epoch: as the stage is called with. size: (h, w) of the crops in pixels, or a
        node that gives it. told: what that node must give, if that is known.
        shapes, random_crop: shapes of the upright images, and how the stage draws crop and flip;
        then the plan has the parts `start`, `shape` and `flip`, and a sample's whole augmentation
        depends on (seed, epoch, id) alone. keyed: ids are keys, see `Order.keys`.

        When the pipeline runs, its first batch raises ValueError if the reader's epochs are not
        those of the stage. So does an id that a reader gives twice in an epoch, if all of them may
        be class labels.
        """
        pipeline = Pipeline.current()
        if pipeline is not None:
            wiring.check_executor(pipeline)
        self._trained = 0  # a new pipeline may begin anew
        self.size = size if isinstance(size, tuple) else told or self.size
        if epoch is not None:
            epoch = self._checked_epoch(epoch)
        elif pipeline is not None and pipeline.max_batch_size != self.batch_size:
            raise ValueError(
                f"batch_size of the stage is {self.batch_size}, of the pipeline "
                f"{pipeline.max_batch_size}; give both the same"
            )
        if getattr(ids, "device", "cpu") != "cpu":
            raise ValueError("ids must be on the CPU, got those on the GPU; pass the reader's own")
        if (shapes is None) != (random_crop is None):
            raise ValueError("shapes and random_crop go together; give both or neither")
        if window is not None and shapes is not None:
            raise ValueError(
                "window is a crop that was drawn elsewhere, shapes and random_crop have the stage "
                "draw it; give window, or the other two"
            )
        if window is not None:
            wiring.check_window(window)
        frames = window if window is not None else () if shapes is None else (shapes,)
        sizes = () if isinstance(size, tuple) else (size,)
        counters: tuple[DataNode, ...] = ()
        if epoch is None:
            counters = (self._iteration(),)
        elif not isinstance(epoch, int):
            counters = (epoch,)
        operator = self.operator(
            self.planner(random_crop, keyed=keyed, in_batch=self._partners_of_batch()),
            epoch="counted" if epoch is None else epoch if isinstance(epoch, int) else "given",
            frames=len(frames),
            size=size if isinstance(size, tuple) else None,
            origin=wiring.check_ids(ids, self.index),
            told=told,
        )
        inputs = (ids, *counters, *frames, *sizes)
        call, function = fn.python_function, operator.python
        if self._by_torch:
            call, function = fn.dl_tensor_python_function, operator.torch
        row, single = call(*inputs, function=function, num_outputs=2, batch_processing=True)
        return PlanNodes(row, single, operator.planner)

    def dynamic(
        self,
        images: Any,
        ids: Any,
        epoch: int,
        window: tuple[Any, Any, Any] | None = None,
    ) -> tuple[Any, Targets]:
        """Augment a batch in DALI's dynamic mode (nvidia.dali.experimental.dynamic).

        images: Batch, HWC, after crop and resize, before flip and normalisation, CPU or GPU.
        ids, window: as the stage is called with, each a Batch, or an array or a list with a value a
        sample. epoch: from 0 on. Batches may have any size and order.
        Returns (images, Targets) of Batches; those of the targets are on the CPU.

        Raises ValueError where the method does more than fill one rectangle of each image, for
        images that are not HWC or no grey levels, for ids or windows of another number of samples,
        and for a negative epoch. Warns (RuntimeWarning) of a batch that has a sample twice.
        """
        epoch = self._checked_epoch(epoch)
        if self._dynamic is None:
            self._dynamic = Dynamic(self._method, self.planner(), self.operator)
        filled, targets = self._dynamic(images, ids, epoch, window)
        return filled, Targets(*targets)

    def _checked_epoch(self, epoch: Any) -> Any:
        """An epoch that the user gives: int, or a node of a pipeline. Raises ValueError for one
        that cannot be, or that the stage would count too."""
        if self.start_epoch:
            raise ValueError(
                f"start_epoch must be 0 where epoch is given, got {self.start_epoch}: leave it out"
            )
        if isinstance(epoch, data_node.DataNode):
            if epoch.device != "cpu":
                raise ValueError(
                    f"epoch must be a number or a node on the CPU, got one on the {epoch.device}; "
                    "pass the source's own"
                )
            return epoch
        number = None
        if not isinstance(epoch, bool):
            with suppress(TypeError):
                number = operator.index(epoch)
        if number is None:
            raise ValueError(f"epoch must be a whole number, or a node on the CPU, got {epoch!r}")
        if number < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}; count from 0")
        return number

    def attach(self, cache: SaliencyCache) -> None:
        """Look maps up in this cache of the index from now on, from the next plan on."""
        if self._lookup is None:
            raise ValueError(
                "cache must be given to the stage for maps to be looked up in it; the path of a "
                "cache that is made later is enough"
            )
        self._lookup.attach(cache)

    @do_not_convert
    def _partners_of_batch(self) -> bool:
        """Whether partners are of the batch, because the index's images cannot be read. Warns of
        it, once."""
        if self._in_batch is None:
            missing = partner.missing(self.index) if self.mixes else None
            self._in_batch = missing is not None
            if self._in_batch:
                warnings.warn(
                    f"the images of the index cannot be read ({missing!r} is no file): second "
                    "images are taken from the same batch; make the index of archives by "
                    "ImageIndex.from_webdataset or from_tfrecord, and that of files with their "
                    f"root, or {NO_PARTNERS}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._in_batch

    def planner(
        self,
        random_crop: CropConfig | None = None,
        *,
        keyed: bool = False,
        in_batch: bool = False,
    ) -> Planner:
        """The function that makes the plan, to be called outside any pipeline.

        random_crop: how it draws crop and flip; None: the window is given to it. keyed: ids are
        keys, see `Order.keys`. in_batch: see Planner.
        """
        return Planner(
            self.index,
            self._method,
            self._run,
            batch_size=self.batch_size,
            batches_per_epoch=self.batches_per_epoch,
            start_epoch=self.start_epoch,
            random_crop=random_crop,
            keyed=keyed,
            look=None if self._lookup is None else self._look_at_epoch,
            in_batch=in_batch,
        )

    def _look_at_epoch(self, epoch: int) -> None:
        """Raise CacheError if the pass that would have made the cache was left out. Warn, once, if
        the user is in a later epoch than the one that is planned.

        Batches are prepared in advance, so that some of an epoch are planned before its pass.
        """
        if epoch < self._trained - 1 and not self._told_of_earlier:
            self._told_of_earlier = True
            warnings.warn(
                f"the stage plans epoch {epoch}, and refresh was called for epoch {self._trained}: "
                "λ and the maps are those of an earlier epoch. Use each epoch of the loader to its "
                "end; resume a pipeline by its checkpoint, or by start_epoch; where you give "
                "`epoch` to the stage, see that the workers get the new one "
                "(persistent_workers=True keeps the old)",
                RuntimeWarning,
                stacklevel=2,
            )
        first = self._refresh_every + -(-_AHEAD // self.batches_per_epoch)
        if self._lookup is not None and self._lookup.cache is None and epoch >= first:
            raise CacheError(
                f"there is no saliency cache at {self._lookup.path!r} in epoch {epoch}, although a "
                f"saliency pass was due before epoch {self._refresh_every}: call the stage's "
                "refresh(model, epoch) before every epoch, or name the cache that was built before"
            )

    def operator(self, planner: Planner, **inputs: Any) -> Operator:
        """The operator that runs the planner inside a pipeline. inputs: how the pipeline feeds it,
        see `Operator`."""

        def spent(seconds: float) -> None:
            self.seconds += seconds

        return Operator(
            planner,
            epoch_size=self.epoch_size,
            num_shards=self.num_shards,
            spent=spent,
            **inputs,
        )

    def apply(self, images: DataNode, plan: PlanNodes) -> DataNode:
        """Do to images (HWC, CPU or GPU) what is planned.

        Raises ValueError where the method mixes in partners and `partner.mix` has not been called.
        """
        if self.mixes and not plan.partners_mixed:
            raise ValueError(
                "images must be mixed with their partners before apply where the method mixes, or "
                "the labels would be mixed alone: call the stage itself, which does both, or "
                f"partner.mix before apply, or {NO_PARTNERS}"
            )
        with base.branches_explained():
            return self._method.apply(images, plan)

    @do_not_convert
    def _iteration(self) -> DataNode:
        """The number of the batch in the run, int64 [1] a sample; a checkpoint restores it.

        With readers, which start again by themselves, DALI counts iterations through the whole run.
        With a source that ends its epochs by StopIteration, DALI counts epochs, and iterations from
        0 in each of them.
        """
        b, batches = self.batch_size, self.batches_per_epoch
        longest = 0

        def number(info: Any) -> np.ndarray:
            nonlocal longest
            # DALI asks once more when another source ends: that number is not used.
            longest = max(longest, info.iteration)
            if info.epoch_idx and longest > batches:
                raise ValueError(
                    f"the stage counts epochs of {batches} batches, and a source in the pipeline "
                    f"ended its epoch after {longest}; give the stage the epoch_size of that source"
                )
            return np.full((b, 1), info.epoch_idx * batches + info.iteration, np.int64)

        return fn.external_source(
            source=number, batch=True, batch_info=True, dtype=types.INT64, ndim=1
        )


def _look_at(cache: SaliencyCache, samples: int, refresh_every: int) -> None:
    """Warn of a cache that lacks maps of some samples. Raises ValueError where it has none and no
    pass will make any."""
    found = cache.coverage().found
    if not found and not refresh_every:
        raise ValueError(
            f"saliency cache {cache.path!r} has no maps, and gets none with refresh_every=0: build "
            "it by `scae-dali build-cache` or refresh_cache, or leave refresh_every out"
        )
    if 0 < found < samples:
        warnings.warn(
            f"saliency cache {cache.path!r} has maps of {found:,} of {samples:,} samples; the "
            "others are erased uniformly until a pass makes theirs",
            RuntimeWarning,
            stacklevel=3,
        )
