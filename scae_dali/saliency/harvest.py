"""Harvest: saliency maps from the forward passes that training makes anyway.

Where the head is a global average pooling and one linear layer, Grad-CAM is the class activation
map of Zhou et al. ("Learning deep features for discriminative localization", CVPR 2016), M = sum_k
w_{y,k} F^k: one small product of the features that the network has just computed. (Where an
activation changes the layer's output in place, as in DenseNet, F is taken after it.) The map of a
crop is laid where the crop was in the full frame, without the part of it that was erased. A
sample's map is the mean over its crops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.functional import grid_sample

from scae_dali.cache.format import Maps
from scae_dali.methods import Status
from scae_dali.saliency.isolation import isolated
from scae_dali.saliency.layers import classifier_of, find_layer, unwrap
from scae_dali.saliency.layout import Layout, layout_of
from scae_dali.saliency.probe import trial_images
from scae_dali.saliency.reach import logits_of, require_finite, zero_weights
from scae_dali.stage.loader import Batch, ids_of

__all__ = ["Harvest", "crop_to_frame"]

# How many crops are laid into the full frame at once. On a GPU, fewer take no less time.
AT_ONCE = 2048


class _Crops(NamedTuple):
    """Maps of a batch of crops that are not yet laid into the full frame.

    maps: float [B,h,w]. size: (H, W) of the crops in pixels. The rest are fields of the `Batch`.
    """

    maps: Tensor
    size: tuple[int, int]
    windows: Tensor
    boxes: Tensor
    flips: Tensor
    status: Tensor
    ids: Tensor

    def table(self) -> Tensor:
        """float64 [B,11], in _COLUMNS: window, erased box in shares of the crop, flip, whether the
        map is usable, id."""
        boxes = self.boxes / torch.tensor(self.size * 2, dtype=torch.float64)
        by_many = (self.status & Status.ERASED).bool() & (boxes[:, 2:].amin(1) <= 0)
        mixed = (self.status & (Status.MIXED | Status.MIXED_IN_BATCH)).bool()
        usable = ~(by_many | mixed)
        columns = (self.windows, boxes, self.flips[:, None], usable[:, None], self.ids[:, None])
        return torch.cat([column.double() for column in columns], 1)


_COLUMNS = (4, 4, 1, 1, 1)  # widths of the parts of `_Crops.table`


class Harvest:
    """The maps of `samples` samples, gathered over the crops that `model` is trained on.

        harvest = Harvest(model, None, samples=len(index), num_classes=1000, grid=(7, 7), size=224)
        logits = model(batch.images)     # with gradients: without, nothing is gathered
        harvest.add(batch)

    model, layer: as for every `CAM`; a hook stays on the layer, so make it before torch.compile.
    grid: (h, w) of the maps over the full frame. size: of the crops, in pixels. Sums lie on the
    model's device, 8·h·w bytes a sample: 0.5 GB for ImageNet at 7x7.

    Raises ValueError for an unknown layer, for weights that are not finite, and where the logits
    are not those of the classifier for the layer's mean. Such a network needs saliency passes.
    """

    method = "harvest"

    def __init__(
        self,
        model: nn.Module,
        layer: str | None,
        *,
        samples: int,
        num_classes: int,
        grid: tuple[int, int],
        size: int,
    ) -> None:
        model = unwrap(model)
        self.layer, module = find_layer(model, layer)
        self._classifier = classifier_of(model, num_classes)[1]
        self._features: Tensor | None = None
        module.register_forward_hook(self._keep)
        self._layout = self._pooled_layout(model, size)
        device = self._classifier.weight.device
        self._grid = grid
        self._sums = torch.zeros(samples, *grid, device=device)
        self._counts = torch.zeros(samples, *grid, device=device)
        self._waiting: list[_Crops] = []

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Take in the batch that the network has just been given, without waiting for the device.

        Samples that are mixed with others, or erased by more than one rectangle, are left out.
        """
        features, self._features = self._features, None
        if features is None:
            raise RuntimeError(
                f"layer {self.layer!r} has not run, with gradients, since the last batch; call "
                "add(batch) once after every model(batch.images). If torch.compile has compiled "
                "another network of this class too, it runs that one's code, without the hook on "
                "the layer: set torch._dynamo.config.skip_nnmodule_hook_guards = False before the "
                "first batch"
            )
        features = self._layout.maps(features)
        weight = self._classifier.weight[batch.labels].to(features.dtype)  # [B,C]
        maps = torch.einsum("bc,bchw->bhw", weight, features)
        if self._waiting and self._waiting[0].maps.shape[1:] != maps.shape[1:]:
            self._lay_waiting()
        size = (batch.images.shape[2], batch.images.shape[3])
        self._waiting.append(
            _Crops(maps, size, batch.windows, batch.boxes, batch.flips, batch.status, ids_of(batch))
        )
        if sum(len(crops.maps) for crops in self._waiting) >= AT_ONCE:
            self._lay_waiting()

    @torch.no_grad()
    def _lay_waiting(self) -> None:
        """Lay the waiting maps into the full frame, where their crops were, and add them up."""
        if not self._waiting:
            return
        table = torch.cat([crops.table() for crops in self._waiting])
        maps = torch.cat([crops.maps for crops in self._waiting])
        self._waiting = []
        table = table.to(maps.device, non_blocking=True)  # one copy for all
        windows, boxes, flips, usable, ids = table.split(_COLUMNS, 1)
        values, seen = crop_to_frame(maps.float(), windows, boxes, flips[:, 0] == 1, self._grid)
        seen &= (usable == 1)[:, :, None]
        ids = ids[:, 0].long()
        self._sums.index_add_(0, ids, torch.where(seen, values, 0.0))
        self._counts.index_add_(0, ids, seen.float())

    def merge(self) -> None:
        """Add up what all ranks have seen. Every rank calls it, and then has the whole.

        To go on gathering, clear all ranks but one: the next merge would otherwise count the whole
        once for each rank.
        """
        self._lay_waiting()
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            for part in (self._sums, self._counts):
                distributed.all_reduce(part)

    def clear(self) -> None:
        """Forget all maps."""
        self._waiting = []
        self._sums.zero_()
        self._counts.zero_()

    def seen(self) -> NDArray[np.int64]:
        """The samples that have a map, int64 [n], ascending."""
        self._lay_waiting()
        return self._counts.amax((1, 2)).nonzero()[:, 0].cpu().numpy()

    def maps(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """ids: int64 [n] -> saliency f32[n,h,w] in [0, 1], and how often each cell was seen.

        The mean over crops, cut off below 0 and scaled to [0, 1] over the cells that were seen; 0
        in the others, and everywhere if all are the same.
        """
        self._lay_waiting()
        rows = torch.from_numpy(ids).to(self._counts.device)
        counts = self._counts[rows].cpu().numpy()
        sums = self._sums[rows].cpu().numpy()
        mean = np.maximum(np.nan_to_num(sums, posinf=0.0) / np.maximum(counts, 1), 0)
        return min_max(mean, counts > 0), counts

    def blended(self, ids: NDArray[np.int64], old: Maps, found: NDArray[np.bool_]) -> Maps:
        """The mean of maps(ids) and older maps. An older map counts as one crop of the whole image.

        old: u8[n,h,w], in 1/255; found: bool[n], whether there is one. Returns u8[n,h,w].
        """
        new, counts = self.maps(ids)
        weight = np.where(found, 1.0, 0.0)[:, None, None]
        mean = (counts * new + weight * (old / 255)) / np.maximum(counts + weight, 1)
        return np.rint(255 * min_max(mean, counts + weight > 0)).astype(np.uint8)

    def state_dict(self) -> dict[str, Any]:
        """What this rank has gathered: `sums` and `counts`, f32[samples,h,w]."""
        self._lay_waiting()
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a rank had gathered; what was added since is forgotten."""
        self._waiting = []
        self._sums.copy_(state["sums"])
        self._counts.copy_(state["counts"])

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._features = output.detach()

    def _pooled_layout(self, model: nn.Module, size: int) -> Layout:
        """How the layer's output is read. Raises ValueError unless the logits are those of the
        classifier for the mean of the features."""
        weight = self._classifier.weight
        with isolated(model, weight.device.type):
            images = trial_images(model, (size, size))
        kept: list[Any] = []
        layout: Layout | None = None
        wanted: Tensor | None = None
        module = model.get_submodule(self.layer)

        def classify(*of_call: Any) -> None:
            nonlocal layout, wanted
            if len(kept) == 1 and isinstance(kept[0], Tensor) and kept[0].ndim == 4:
                layout = layout_of(self.layer, kept[0].shape, images, model, module)
                pooled = layout.maps(kept[0]).mean((2, 3))
                if pooled.shape[1] == self._classifier.in_features:
                    wanted = self._classifier(pooled)

        handles = [module.register_forward_hook(lambda *of_call: kept.append(of_call[2]))]
        handles.append(model.register_forward_hook(classify))
        try:
            with isolated(model, weight.device.type):
                # A classifier that starts from zero would agree with any layer.
                weights = zero_weights(model)
                logits = logits_of(torch.func.functional_call(model, weights, (images,)))
        finally:
            for handle in handles:
                handle.remove()
        if not logits.isfinite().all():
            require_finite(model)
        close = wanted is not None and torch.allclose(
            logits, wanted, atol=1e-3 * float(logits.std())
        )
        if layout is None or not close:
            raise ValueError(
                f"{type(model).__name__} does not classify the mean of layer {self.layer!r}, so "
                "its maps cannot be harvested; set saliency.source to pass, or name the last "
                "feature map before the pooling by saliency.layer"
            )
        return layout


def crop_to_frame(
    maps: Tensor, windows: Tensor, boxes: Tensor, flips: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Maps of crops, at the centres of the full frame's cells.

    maps: f32[B,h,w]. windows: float[B,4], the crops (y, x, h, w) in shares of the full frame.
    boxes: float[B,4], erased, in shares of the crop before the flip. flips: bool[B], whether the
    network saw the crop turned left to right. grid: of the full frame. Returns f32[B,*grid],
    bilinear (`align_corners=False`), and bool[B,*grid]: the cells whose centre the crop shows.
    """
    along = []
    for axis, cells in enumerate(grid):
        centre = (torch.arange(cells, device=maps.device, dtype=windows.dtype) + 0.5) / cells
        start, length = windows[:, axis, None], windows[:, axis + 2, None]
        at = (centre - start) / length  # [B,cells], in shares of the crop
        box, box_length = boxes[:, axis, None], boxes[:, axis + 2, None]
        inside = (at >= 0) & (at < 1)
        along.append((at, inside, (at >= box) & (at < box + box_length)))
    (y, in_y, cut_y), (x, in_x, cut_x) = along
    x = torch.where(flips[:, None], 1 - x, x)
    seen = in_y[:, :, None] & in_x[:, None, :] & ~(cut_y[:, :, None] & cut_x[:, None, :])
    shape = (len(maps), *grid)
    where = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], 3)
    sampled = grid_sample(
        maps[:, None], (2 * where - 1).float(), padding_mode="border", align_corners=False
    )
    return sampled[:, 0], seen


def min_max(values: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """values: float[n,h,w], scaled to [0, 1] over the known cells of each; elsewhere 0."""
    low = np.where(known, values, np.inf).min((1, 2), keepdims=True)
    high = np.where(known, values, -np.inf).max((1, 2), keepdims=True)
    usable = known & (high > low)
    out = np.zeros(values.shape, np.float32)
    np.divide(
        values - np.where(high > low, low, 0),
        np.where(high > low, high - low, 1),
        out,
        where=usable,
        casting="same_kind",
    )
    return out
