"""The saliency pass: a map of every sample's own label, into the cache.

Every rank computes its part; the first process of each node writes, in key order (of several ranks
in that of the index), a chunk a transaction. A pass that was killed goes on with the samples whose
records do not carry its stamp. When a pass is due is decided by `schedule`, what a map shows by the
method; maps that training has gathered by itself (`harvest`) are written along.
"""

import hashlib
import io
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from scae_dali.cache.cache import SaliencyCache
from scae_dali.cache.limits import check_neighbors
from scae_dali.cache.records import checked_epoch, flat
from scae_dali.cache.writer import ChunkWriter
from scae_dali.checks import check, check_choice
from scae_dali.data.index import ImageIndex
from scae_dali.saliency.cam import CAM, SaliencyMethod
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.layers import classifier_of
from scae_dali.saliency.scorecam import ScoreCAM
from scae_dali.stage.loader import Batch

# (model, layer) -> what maps images and labels; layer None: by the network's family.
MethodFactory = Callable[[nn.Module, str | None], SaliencyMethod]

METHODS: dict[str, type[CAM]] = {cam.method: cam for cam in (GradCAM, ScoreCAM)}

COMPARED = 4096  # maps that are compared, of a pass


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """images: seen by this pass, all ranks, 0 where there was nothing to do. harvested: maps that
    were written without. flat: those of both that are the same everywhere, and so guide nothing.
    seconds: wall clock. agreement: the mean rank correlation (Spearman) of harvested maps with
    those of the pass, over samples that have both; None where none has.
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
    share: of the samples, whose maps are made anew, the stalest first; 0: none. harvest: what
    training has gathered, for the rest; it is merged over the ranks, and not cleared.
    method: a name of `METHODS`, or what makes one, such as partial(ScoreCAM, chunk=256); maps of
    this epoch by another method, as by other weights, are withdrawn and made anew. layer: see CAM.
    name, input_size: of the model, for the cache's meta. settings: what else the maps depend on,
    such as {"mean": ..., "std": ..., "amp": ...}; maps of this epoch by others are made anew, see
    `SaliencyCache.begin_pass`. progress: called with the number of images done since its last call.
    neighbors: how many neighbouring classes of each the cache shall hold, by the weights of the
    model's classifier (see nearest_classes).
    Warns (RuntimeWarning) where more than half of the maps are flat.
    Raises what the cache raises; whatever was committed stays, and the next call goes on from
    there. ValueError for an unknown method, where neighbours are wanted of a model without a
    linear classifier or of too many classes, and for a loader of other samples than it was asked
    for.
    """
    start = time.perf_counter()
    checked_epoch(epoch)
    check_neighbors(neighbors, index.num_classes)
    if not (0 < share <= 1 or (share == 0 and (harvest is not None or neighbors))):
        raise ValueError(
            f"share must be in (0, 1], or 0 where there is a harvest or neighbors, got {share}"
        )
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if world > 1 else 0
    if isinstance(method, str):
        check_choice("method", method, tuple(METHODS))
        method = METHODS[method]
    cam = method(model, layer)
    classifier = classifier_of(cam.model, index.num_classes)[1] if neighbors else None
    count = math.ceil(round(share * len(index), 6))  # 0.07 · 50,000 is 3500, not a little more
    part: dict[str, Any] = {}
    if harvest is not None:
        harvest.merge()
    if cache is not None and (count < len(index) or harvest is not None):
        chosen = cache.stalest(count, epoch=epoch)
        gathered = np.empty(0, np.int64) if harvest is None else harvest.seen()
        # A pass that is resumed may have written more than it would choose now.
        done = np.flatnonzero(cache.stamps() == epoch) if count else chosen
        part["ids"] = np.unique(np.concatenate([chosen, gathered, done]))
    writer: AbstractContextManager[ChunkWriter | None] = nullcontext()
    if cache is not None:
        made_by = [cam.method] if count else []
        made_by += [] if harvest is None else [harvest.method]
        writer = ChunkWriter(
            cache,
            epoch,
            commit_every=commit_every,
            weights=weights_digest(cam.model),
            method="+".join(made_by) or None,
            model=name or type(cam.model).__name__,
            layer=cam.layer,
            input_size=input_size,
            settings=settings,
            **part,
        )
    compared: list[np.ndarray] = []
    blank: list[np.ndarray] = []  # ids of flat maps
    with writer as chunks:
        pending = np.empty(0, np.int64) if chunks is None else chunks.pending
        given = np.empty(0, np.int64)
        if cache is not None and harvest is not None:
            seen = np.isin(pending, np.setdiff1d(gathered, chosen))
            given, pending = pending[seen], pending[~seen]
        if world > 1:
            pending = _union(pending, index, next(model.parameters()).device)

        def take(ids: np.ndarray, levels: np.ndarray) -> None:
            progress(len(ids))
            blank.append(ids[flat(levels)])
            if chunks is not None:
                chunks.write(ids, levels)
            if harvest is not None and sum(map(len, compared)) < COMPARED:
                compared.append(agreement(levels, *harvest.maps(ids)))

        if len(pending):
            # Rank r takes every world-th sample: what the ranks give together is in this order.
            turn = np.resize(pending, -(-len(pending) // world) * world)[rank::world]
            turn = turn.tolist()
            batches = _asked(loader_for(turn), turn)
            _pass(cam, batches, index.labels, world, autocast, take)
        if cache is not None and chunks is not None and harvest is not None:
            # Last: a pass that is resumed tells its share by their stamps.
            for ids in np.split(given, range(commit_every, len(given), commit_every)):
                maps = harvest.blended(ids, *cache.read(ids))
                blank.append(ids[flat(maps)])
                chunks.write(ids, maps)
        if cache is not None and classifier is not None:
            near = nearest_classes(classifier.weight, index.class_counts, neighbors)
            cache.write_neighbors(near)
    if world > 1:
        distributed.barrier()  # nobody plans with the old maps after this
    known = np.concatenate([np.empty(0), *compared])
    # The last batch of all ranks may have samples twice.
    blanks = len(np.unique(np.concatenate([np.empty(0, np.int64), *blank])))
    note = flat_note(blanks, len(pending) + len(given), cam.layer)
    if note is not None and rank == 0:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return PassReport(
        images=len(pending),
        harvested=len(given),
        flat=blanks,
        seconds=time.perf_counter() - start,
        agreement=float(np.nanmean(known)) if np.isfinite(known).any() else None,
    )


def flat_note(flat: int, maps: int, layer: str) -> str | None:
    """What to say of so many flat maps, if they are more than half."""
    if 2 * flat <= maps:
        return None
    return (
        f"{flat:,} of {maps:,} saliency maps of layer {layer!r} are flat (the same everywhere) and "
        "guide nothing: check that the layer has more than one position, that it lies before the "
        "pooling or the last attention, and that the weights are trained and finite"
    )


def _asked(batches: Iterable[Batch], ids: Sequence[int]) -> Iterator[Batch]:
    """The batches, as long as they are of these samples in this order, and of all of them."""
    remedy = "read the ids that loader_for is given, all of them and in their order"
    check(batches is not None, f"loader_for returned None for {len(ids)} samples; {remedy}")
    wanted, whole = torch.tensor(ids), torch.tensor([0.0, 0.0, 1.0, 1.0])
    done = 0
    for batch in batches:
        given = batch.ids.long()
        asked = wanted[done : done + len(given)]
        same = min(len(given), len(asked))
        differs = (given[:same] != asked[:same]).nonzero()
        if len(differs):
            place = int(differs[0])
            raise ValueError(
                f"loader_for gave sample {int(given[place])} where sample {int(asked[place])} was "
                f"asked for, as number {done + place + 1} of {len(ids)}; {remedy}"
            )
        altered = (batch.windows.float() != whole).any(1) | batch.flips | (batch.status != 0)
        if altered.any():
            raise ValueError(
                f"loader_for gave sample {int(given[altered][0])} cropped, flipped, erased or "
                "mixed, and maps are of whole images as they are: read them by a pipeline of "
                "their own, which stretches them to the network's size"
            )
        if len(given) > same:
            raise ValueError(
                f"loader_for gave more than the {len(ids)} samples that were asked for: then "
                f"sample {int(given[same])}; {remedy}"
            )
        done += same
        yield batch
    check(
        done == len(ids),
        f"loader_for gave {done} of the {len(ids)} samples that were asked for, and ended before "
        f"sample {ids[min(done, len(ids) - 1)]}; {remedy}, in a new loader for every call, and "
        "without dropping the last batch",
    )


def _pass(
    cam: SaliencyMethod,
    batches: Iterable[Batch],
    labels: np.ndarray,
    world: int,
    autocast: Callable[[], AbstractContextManager],
    take: Callable[[np.ndarray, np.ndarray], None],
) -> None:
    """Make the maps of batches, and hand those of all ranks on: take(ids int64 [n], maps uint8
    [n, h, w]).

    A batch is handed on when the next one has been queued, so that the device never waits for the
    host; the last ones also where the loop breaks off. labels: int64 [N], of all samples.
    """
    own = torch.from_numpy(labels.copy())
    queued = None

    def hand_on(of_batch: Callable[[], list[np.ndarray]]) -> None:
        ids, levels, outside = of_batch()
        check(
            not outside,
            f"method {cam.method!r} must give maps in [0, 1] (they are kept in 8 bits), and gave "
            "others, or some that are not finite; scale each map, and give zeros for none",
        )
        take(ids, levels)

    try:
        for batch in batches:
            with autocast():
                # Labels from the host: to read them from the device would be to wait for it.
                maps = cam(batch.images, own[batch.ids])
            levels = (maps * 255).round()
            outside = ~((levels >= 0) & (levels <= 255)).all()  # true of NaN as well
            every = _gather(batch.ids, levels.to(torch.uint8), world)
            before, queued = queued, _to_host(*every, outside)
            if before is not None:
                hand_on(before)
    finally:
        if queued is not None:
            hand_on(queued)


def agreement(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of maps, float64 [n], over the cells that `counts` has seen; NaN
    where a map is constant there. one, other, counts: [n, h, w]."""
    from scipy.stats import rankdata  # takes a second to import

    known = (counts > 0).reshape(len(one), -1)
    cells = np.maximum(known.sum(1, keepdims=True), 1)
    places = []
    for maps in (one, other):
        # What is unknown ranks last, and so does not move the others.
        ranks = rankdata(np.where(known, maps.reshape(known.shape), np.inf), axis=1) * known
        places.append((ranks - ranks.sum(1, keepdims=True) / cells) * known)
    a, b = places
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


@torch.no_grad()
def nearest_classes(weight: Tensor, class_counts: np.ndarray, m: int) -> np.ndarray:
    """The classes whose weight vectors have the highest cosine similarity, the highest first.

    weight: float [K, C], of the classifier. class_counts: int64 [K]; a class without samples is
    nobody's neighbour while there are others. Returns uint16 [K, min(m, K - 1)]. Raises ValueError
    where that does not name the classes.
    """
    check_neighbors(m, len(weight))
    unit = nn.functional.normalize(weight.float().cpu(), dim=1)
    similarity = unit @ unit.T
    similarity[:, torch.from_numpy(class_counts == 0)] = -2.0
    similarity.fill_diagonal_(-3.0)
    nearest = similarity.topk(min(m, len(weight) - 1), dim=1).indices
    return nearest.numpy().astype(np.uint16)


def weights_digest(model: nn.Module) -> str:
    """BLAKE2b-128 of every parameter, buffer and extra state, hex: tells one state of the model
    from another."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        for part in _stable_bytes(value):
            digest.update(part)
    return digest.hexdigest()


_PLAIN = (str, bytes, int, float, complex, type(None), np.generic, torch.dtype, torch.device)


def _stable_bytes(value: Any) -> Iterator[Any]:
    """Buffers that tell a value of a state_dict, the same in every process.

    Pickle's would not be: they depend on which objects are shared, and on the order of a set. Of an
    object of an unknown class only the class is told.
    """
    if isinstance(value, Tensor):
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype.str}{value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, io.BytesIO):
        yield value.getvalue()
    elif isinstance(value, Mapping | list | tuple | set | frozenset):
        yield f"{type(value).__name__}{len(value)}".encode()
        entries: Iterable[Any] = value.items() if isinstance(value, Mapping) else value
        parts = [b"".join(map(bytes, _stable_bytes(entry))) for entry in entries]
        if not isinstance(value, list | tuple):
            parts.sort()
        for part in parts:
            yield f"{len(part)}:".encode()
            yield part
    elif isinstance(value, _PLAIN):
        yield repr(value).encode()
    else:
        yield type(value).__qualname__.encode()


def _gather(ids: Tensor, maps: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """Those of all ranks: int64 [n], uint8 [n, h, w]; every rank gives as many."""
    if world == 1:
        return ids, maps
    ids, maps = ids.to(maps.device, non_blocking=True).contiguous(), maps.contiguous()
    all_ids = [torch.empty_like(ids) for _ in range(world)]
    all_maps = [torch.empty_like(maps) for _ in range(world)]
    distributed.all_gather(all_ids, ids)
    distributed.all_gather(all_maps, maps)
    return torch.cat(all_ids), torch.cat(all_maps)


def _to_host(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Begin to copy tensors to the host -> a function that waits for them and gives arrays."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    done = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait() -> list[np.ndarray]:
        for event in done:
            event.synchronize()
        return [copy.numpy() for copy in copies]

    return wait


def _union(pending, index, device):
    """Samples that some node's cache still lacks, in the order of the index."""
    missing = torch.zeros(len(index), dtype=torch.uint8, device=device)
    missing[torch.from_numpy(pending).to(device)] = 1
    distributed.all_reduce(missing, distributed.ReduceOp.MAX)
    return missing.nonzero().flatten().cpu().numpy()
