"""A saliency method over many whole images: their maps, in 8 bits, on the host, from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, distributed

from scae_dali.checks import check
from scae_dali.saliency.cam import SaliencyMethod
from scae_dali.saliency.probe import own_tensor
from scae_dali.stage.loader import Batch, ids_of

__all__ = ["asked_batches", "make_maps", "rank_and_world"]

Take = Callable[[np.ndarray, np.ndarray], None]


def rank_and_world() -> tuple[int, int]:
    """Which of the ranks of torch.distributed this process is, and how many there are."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    return (distributed.get_rank() if world > 1 else 0), world


def make_maps(
    cam: SaliencyMethod,
    loader_for: Callable[[Sequence[int]], Iterable[Batch]],
    ids: np.ndarray,
    labels: np.ndarray,
    autocast: Callable[[], AbstractContextManager],
    take: Take,
) -> None:
    """Make the maps of samples, each of its own label, and give those of all ranks to each rank.

    Every rank calls it, with the same ids, and computes its part of them. Without autocast, images
    are brought to the type of the network's weights. ids: int64 [n]. labels: int64 [N], of all
    samples of the index. take(ids int64 [m], maps uint8 [m, h, w]) is called in the order of ids;
    the last batch of all ranks may have samples twice.

    Raises ValueError where loader_for gives other batches than those of the samples that it is
    asked for, as whole images, and where the method gives maps that are not in [0, 1].
    """
    if not len(ids):
        return
    rank, world = rank_and_world()
    # Rank r takes every world-th sample: what the ranks give together is in the order of ids.
    part = np.resize(ids, -(-len(ids) // world) * world)[rank::world].tolist()
    own, dtype = torch.from_numpy(labels.copy()), own_tensor(cam.model).dtype
    queued = None

    def hand_on(of_batch: Callable[[], list[np.ndarray]]) -> None:
        these, levels, outside = of_batch()
        check(
            not outside,
            f"method {cam.method!r} must give maps in [0, 1] (they are kept in 8 bits), and gave "
            "others, or some that are not finite; scale each map, and give zeros for none",
        )
        take(these, levels)

    # A batch is handed on when the next one has been queued, so that the device never waits for
    # the host; the last one also where the loop breaks off.
    try:
        for batch in asked_batches(loader_for(part), part):
            with autocast():
                images = batch.images
                if not torch.is_autocast_enabled(images.device.type):
                    images = images.to(dtype)
                # Labels come from the host: reading them from the device would wait for it.
                maps = cam(images, own[ids_of(batch)])
            levels = (maps * 255).round()
            outside = ~((levels >= 0) & (levels <= 255)).all()  # true of NaN as well
            every = _gather(ids_of(batch), levels.to(torch.uint8), world)
            before, queued = queued, _to_host(*every, outside)
            if before is not None:
                hand_on(before)
    finally:
        if queued is not None:
            hand_on(queued)


def asked_batches(batches: Iterable[Batch], ids: Sequence[int]) -> Iterator[Batch]:
    """The batches, checked to hold exactly these samples in this order."""
    remedy = "read the ids that loader_for is given, all of them and in their order"
    check(batches is not None, f"loader_for returned None for {len(ids)} samples; {remedy}")
    wanted, whole = torch.tensor(ids), torch.tensor([0.0, 0.0, 1.0, 1.0])
    done = 0
    for batch in batches:
        check(
            all(hasattr(batch, name) for name in ("images", "ids", "windows", "flips", "status")),
            f"loader_for must give batches as scae_dali.Batch, got {type(batch).__name__}: a "
            "Loader or whole_loader gives them",
        )
        given = ids_of(batch).long()
        asked = wanted[done : done + len(given)]
        same = min(len(given), len(asked))
        differs = (given[:same] != asked[:same]).nonzero()
        if len(differs):
            k = int(differs[0])
            raise ValueError(
                f"loader_for gave sample {int(given[k])} where sample {int(asked[k])} was "
                f"asked for, as number {done + k + 1} of {len(ids)}; {remedy}"
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


def _gather(ids: Tensor, maps: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """The ids and maps of all ranks: int64 [n], uint8 [n, h, w]; every rank gives as many."""
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
