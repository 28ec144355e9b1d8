"""The saliency pass: it brings the maps in a cache up to date with a network.

A pass chooses samples, makes their maps, each for the sample's own label, and stores them. Every
rank computes its part; the first process of each node writes, in the order of the record keys (with
several ranks in that of the index), one chunk in a transaction. A pass that was killed goes on with
the samples whose records do not carry its stamp.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from scae_dali.cache import ChunkWriter, SaliencyCache
from scae_dali.cache.format import check_neighbors, checked_epoch, flat
from scae_dali.checks import check
from scae_dali.data.index import ImageIndex
from scae_dali.saliency.cam import CAM, SaliencyMethod
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.layers import classifier_of
from scae_dali.saliency.package import PREFIX, PackageCAM
from scae_dali.saliency.probe import own_tensor
from scae_dali.saliency.scorecam import ScoreCAM
from scae_dali.saliency.sweep import make_maps, rank_and_world
from scae_dali.saliency.weights import nearest_classes, weights_digest
from scae_dali.stage.loader import Batch

# (model, layer) -> a saliency method; layer None: the usual one of the network's family.
MethodFactory = Callable[[nn.Module, str | None], SaliencyMethod]

METHODS: dict[str, type[CAM]] = {cam.method: cam for cam in (GradCAM, ScoreCAM)}

COMPARED = 4096  # maps of a pass that are compared with harvested ones


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """What a pass did.

    images: how many the network was run on, by all ranks; 0 where there was nothing to do.
    harvested: maps that were taken from the harvest, without running the network.
    flat: maps, of both kinds, that are the same everywhere, and so guide nothing.
    seconds: wall clock.
    agreement: mean rank correlation (Spearman) of harvested maps with those of the pass, over the
    samples that have both; None where none has.
    """

    images: int
    harvested: int
    seconds: float
    agreement: float | None
    flat: int = 0


def refresh_cache(
    model: nn.Module,
    cache: SaliencyCache | None,
    index: ImageIndex,
    loader_for: Callable[[Sequence[int]], Iterable[Batch]],
    *,
    epoch: int,
    share: float = 1.0,
    harvest: Harvest | None = None,
    method: str | MethodFactory = "gradcam",
    layer: str | None = None,
    name: str | None = None,
    input_size: int | tuple[int, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    neighbors: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int], object] = lambda images: None,
    commit_every: int = 4096,
) -> PassReport:
    """Bring the cache to `epoch`; every rank calls it.

    cache: of this node, given to the one process of the node that writes; None on the others.
    loader_for(ids): batches of whole upright images, of these samples and no others, in this order,
    normalised as in training; every rank is given ids of its own.
    share: which share of the samples gets maps from the network, the stalest first; 0: none.
    harvest: gives the maps of the other samples; it is merged over the ranks, and not cleared.
    method: a name of `METHODS`, pytorch_grad_cam:NAME for a method of that package, such as
    LayerCAM, or a factory such as partial(ScoreCAM, chunk=256). Maps of this
    epoch that another method or other weights made are withdrawn and made anew. layer: see CAM.
    name, input_size: of the model, for the cache's meta. settings: what else the maps depend on,
    such as {"mean": ..., "std": ..., "amp": ...}; maps of this epoch with others are made anew, see
    `SaliencyCache.begin_pass`. progress: called with the number of images done since its last call.
    neighbors: how many neighbouring classes the cache shall hold for each class, by the weights of
    the model's classifier (see nearest_classes).
    Warns (RuntimeWarning) where more than half of the maps are flat.
    Raises what the cache raises; whatever was committed stays, and the next call goes on from
    there. Raises ValueError for an unknown method, for neighbours if the model has no linear
    classifier or too many classes, and for a loader that gives other samples than it was asked for.
    """
    start = time.perf_counter()
    _check_settings(epoch, share, harvest, neighbors, index.num_classes)
    cam = factory_of(method)(model, layer)
    classifier = classifier_of(cam.model, index.num_classes)[1] if neighbors else None
    check(
        classifier is None or bool(classifier.weight.isfinite().all()),
        "model must have finite weights in its classifier, got NaN or infinite ones, which have no "
        "neighbouring classes: it has diverged, so lower the learning rate and go on from earlier "
        "weights",
    )
    count = math.ceil(round(share * len(index), 6))  # 0.07 · 50,000 is 3500, not a little more
    if harvest is not None:
        harvest.merge()
    provenance = {
        "method": _made_by(cam if count else None, harvest),
        "model": name or type(cam.model).__name__,
        "layer": cam.layer,
        "input_size": input_size,
        "settings": settings,
    }
    rank, world = rank_and_world()

    choice = choose_samples(cache, len(index), count, epoch, harvest)
    with _begin(cache, epoch, choice, cam.model, provenance, commit_every) as writer:
        pending = np.empty(0, np.int64) if writer is None else writer.pending
        from_harvest = np.isin(pending, choice.harvested)
        gathered, pending = pending[from_harvest], pending[~from_harvest]
        if world > 1:
            pending = _union(pending, index, own_tensor(model).device)
        store = Store(writer, harvest, progress)
        make_maps(cam, loader_for, pending, index.labels, autocast, store.take_maps)
        if cache is not None:
            # Last: a resumed pass knows its share by the stamps of the maps above.
            store.take_harvest(cache, gathered, commit_every)
            if classifier is not None:
                near = nearest_classes(classifier.weight, index.class_counts, neighbors)
                cache.write_neighbors(near)
    if world > 1:
        distributed.barrier()  # nobody plans with the old maps after this

    note = flat_note(store.flat_maps, len(pending) + len(gathered), cam.layer)
    if note is not None and rank == 0:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return PassReport(
        images=len(pending),
        harvested=len(gathered),
        flat=store.flat_maps,
        seconds=time.perf_counter() - start,
        agreement=store.mean_agreement,
    )


def _check_settings(
    epoch: int, share: float, harvest: Harvest | None, neighbors: int, num_classes: int
) -> None:
    """Raise ValueError for settings of a pass that do not go together, or with a cache."""
    checked_epoch(epoch)
    check_neighbors(neighbors, num_classes)
    if not (0 < share <= 1 or (share == 0 and (harvest is not None or neighbors))):
        raise ValueError(
            f"share must be in (0, 1], or 0 where there is a harvest or neighbors, got {share}"
        )


def factory_of(method: str | MethodFactory) -> MethodFactory:
    """The factory of a method, which may be given by its name; ValueError for an unknown one."""
    if not isinstance(method, str):
        return method
    if method.startswith(PREFIX):
        return partial(PackageCAM, method.removeprefix(PREFIX))
    check(
        method in METHODS,
        f"method must be one of {', '.join(METHODS)}, or {PREFIX}NAME for one of the package "
        f"pytorch-grad-cam, such as {PREFIX}LayerCAM; got {method!r}",
    )
    return METHODS[method]


def _made_by(cam: SaliencyMethod | None, harvest: Harvest | None) -> str | None:
    """The name in the cache of what makes the maps; None if nothing does."""
    return "+".join(one.method for one in (cam, harvest) if one is not None) or None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The samples that a pass is of.

    ids: int64 [n], ascending, those whose maps are written; None: all of the index.
    harvested: int64 [m], those of them whose map is the harvested one.
    """

    ids: np.ndarray | None = None
    harvested: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def choose_samples(
    cache: SaliencyCache | None, samples: int, count: int, epoch: int, harvest: Harvest | None
) -> Choice:
    """Step 1 of a pass. The network makes the maps of the `count` samples whose maps are stalest;
    the harvest gives those of the others, as far as training has seen them.

    cache: None in a process that writes none; what is chosen there does not matter. samples: of the
    index.
    """
    if cache is None or (count >= samples and harvest is None):
        return Choice()
    chosen = cache.stalest(count, epoch=epoch)
    seen = np.empty(0, np.int64) if harvest is None else harvest.seen()
    # A pass that is resumed may have written more than it would choose now.
    done = np.flatnonzero(cache.stamps() == epoch) if count else chosen
    return Choice(
        ids=np.unique(np.concatenate([chosen, seen, done])),
        harvested=np.setdiff1d(seen, chosen),
    )


def _begin(
    cache: SaliencyCache | None,
    epoch: int,
    choice: Choice,
    model: nn.Module,
    provenance: Mapping[str, Any],
    commit_every: int,
) -> AbstractContextManager[ChunkWriter | None]:
    """The pass as a context that gives its writer; None in a process that writes no cache."""
    if cache is None:
        return nullcontext()
    begin = {"weights": weights_digest(model), **provenance}
    if choice.ids is not None:
        begin["ids"] = choice.ids
    return ChunkWriter(cache, epoch, commit_every=commit_every, **begin)


class Store:
    """Step 3 of a pass: maps go into the cache of this node, and are counted.

    writer: None in a process that writes no cache; there they are counted alone. progress: called
    with the number of images that the network was run on.
    """

    def __init__(
        self,
        writer: ChunkWriter | None,
        harvest: Harvest | None,
        progress: Callable[[int], object],
    ) -> None:
        self._writer, self._harvest, self._progress = writer, harvest, progress
        self._compared: list[np.ndarray] = []  # float64, Spearman's of each map
        self._flat: list[np.ndarray] = []  # ids

    def take_maps(self, ids: np.ndarray, maps: np.ndarray) -> None:
        """Maps that the network has made. ids: int64 [n]. maps: uint8 [n, h, w]."""
        self._progress(len(ids))
        self._write(ids, maps)
        if self._harvest is not None and sum(map(len, self._compared)) < COMPARED:
            self._compared.append(agreement(maps, *self._harvest.maps(ids)))

    def take_harvest(self, cache: SaliencyCache, ids: np.ndarray, at_once: int) -> None:
        """Harvested maps of samples, averaged with those in the cache. ids: int64 [n]."""
        if self._harvest is None:
            return
        for some in np.split(ids, range(at_once, len(ids), at_once)):
            self._write(some, self._harvest.blended(some, *cache.read(some)))

    def _write(self, ids: np.ndarray, maps: np.ndarray) -> None:
        self._flat.append(ids[flat(maps)])
        if self._writer is not None:
            self._writer.write(ids, maps)

    @property
    def flat_maps(self) -> int:
        """Samples whose map is the same everywhere."""
        # The last batch of all ranks may have samples twice.
        return len(np.unique(np.concatenate([np.empty(0, np.int64), *self._flat])))

    @property
    def mean_agreement(self) -> float | None:
        """The mean of `agreement` over the maps that were compared; None where it is unknown."""
        known = np.concatenate([np.empty(0), *self._compared])
        return float(np.nanmean(known)) if np.isfinite(known).any() else None


def flat_note(flat: int, maps: int, layer: str) -> str | None:
    """What to say of so many flat maps, if they are more than half."""
    if 2 * flat <= maps:
        return None
    return (
        f"{flat:,} of {maps:,} saliency maps of layer {layer!r} are flat (the same everywhere) and "
        "guide nothing: check that the layer has more than one position, that it lies before the "
        "pooling or the last attention, and that the weights are trained and finite"
    )


def agreement(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of maps, float64 [n], over the cells that `counts` has seen; NaN
    where a map is constant there. one, other, counts: [n, h, w]."""
    from scipy.stats import rankdata  # takes a second to import

    known = (counts > 0).reshape(len(one), -1)
    cells = np.maximum(known.sum(1, keepdims=True), 1)
    centred = []
    for maps in (one, other):
        # Unknown cells rank last, so that they do not change the other ranks.
        ranks = rankdata(np.where(known, maps.reshape(known.shape), np.inf), axis=1) * known
        centred.append((ranks - ranks.sum(1, keepdims=True) / cells) * known)
    a, b = centred
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def _union(pending: np.ndarray, index: ImageIndex, device: torch.device) -> np.ndarray:
    """Samples that some node's cache still lacks, int64 [n], in the order of the index."""
    missing = torch.zeros(len(index), dtype=torch.uint8, device=device)
    missing[torch.from_numpy(pending).to(device)] = 1
    distributed.all_reduce(missing, distributed.ReduceOp.MAX)
    return missing.nonzero().flatten().cpu().numpy()
