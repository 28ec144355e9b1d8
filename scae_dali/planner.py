"""A batch's whole plan as one table, outside any graph: crop, flip, labels, and the method's part.

Pure: a row depends on (seed, epoch, id, window, saliency) alone. How the table gets into a DALI
pipeline and out of it is for `ops` and `iterator`.
"""

from itertools import accumulate
from typing import Any

from array_api_compat import array_namespace

from scae_dali import crop
from scae_dali.config import CropConfig
from scae_dali.dataset import ImageIndex
from scae_dali.methods.base import Method, Run, Samples
from scae_dali.rng import Array, Stream, uniforms

# Of every plan, in this order, with their widths; `box` is (y, x, h, w) in pixels of the crop.
COMMON = {"label": 1, "partner": 1, "id": 1, "status": 1, "mu": 1, "box": 4}
COMMON_WIDTH = sum(COMMON.values())
# Where the crop is drawn here: start (y, x) and shape (h, w) in pixels of the full frame.
DRAWN = {"start": 2, "shape": 2, "flip": 1}


def columns_of(widths: dict[str, int]) -> dict[str, slice]:
    """Where each name lies in a row."""
    ends = list(accumulate(widths.values()))
    return {
        name: slice(end - width, end)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


class Planner:
    """Ids, iteration and crop windows -> float64 [B, K], laid out by `columns`.

    The epoch is iteration // batches_per_epoch + start_epoch. random_crop: how to draw crop and
    flip; None: the window is given.
    """

    def __init__(
        self,
        index: ImageIndex,
        method: Method,
        run: Run,
        *,
        batches_per_epoch: int,
        start_epoch: int = 0,
        random_crop: CropConfig | None = None,
    ) -> None:
        self.index = index
        self.random_crop = random_crop
        drawn = {} if random_crop is None else DRAWN
        self.columns = columns_of(COMMON | drawn | dict(method.fields))
        self._method, self._run = method, run
        self._batches_per_epoch, self._start_epoch = batches_per_epoch, start_epoch
        self._labels = index.labels.copy()  # torch shares only arrays that can be written to

    def __call__(
        self, ids: Array, iteration: Array, size_px: Array, window: Array | None = None
    ) -> Array:
        """The plan of a batch, in the array library of `ids` (NumPy or torch).

        ids, iteration: int64 [B]. size_px: int64 [B, 2], (H, W) of the crop as the network sees it.
        window: float64 [B, 6], start, shape and the shape of the upright image, in pixels;
        [B, 2], that shape alone, where the crop is drawn here; None: the whole image is seen.
        Raises IndexError for an id outside the index.
        """
        xp = array_namespace(ids)
        b, device = ids.shape[0], ids.device
        labels = self._label(xp, ids)
        epoch = iteration // self._batches_per_epoch + self._start_epoch
        drawn = []
        if self.random_crop is not None:
            n = crop.draws_per_sample(self.random_crop)
            u = uniforms(self._run.seed, Stream.CROP, epoch, ids, n)
            cut, flip = crop.crop_and_flip(u, window, self.random_crop)
            drawn = [xp.astype(cut, xp.float64), xp.astype(flip, xp.float64)[:, None]]
            window = xp.concat([drawn[0], window], axis=1)
        if window is None:
            share = xp.zeros((b, 4), dtype=xp.float64, device=device)
            share[:, 2:] = 1.0
        else:
            share = window[:, :4] / xp.concat([window[:, 4:], window[:, 4:]], axis=1)
        plan = self._method.plan(
            Samples(ids=ids, labels=labels, epoch=epoch, window=share, size_px=size_px)
        )
        table = xp.empty((b, COMMON_WIDTH), dtype=xp.float64, device=device)
        table[:, 0] = labels
        table[:, 1] = self._label(xp, plan["partner"]) if "partner" in plan else labels
        table[:, 2] = ids
        table[:, 3] = plan["status"]
        table[:, 4] = plan.get("mu", 1.0)
        table[:, 5:] = plan.get("box", 0.0)
        return xp.concat([table, *drawn, *(plan[name] for name in self._method.fields)], axis=1)

    def _label(self, xp: Any, ids: Array) -> Array:
        bad = (ids < 0) | (ids >= len(self._labels))
        if xp.any(bad):
            raise IndexError(
                f"ids must be in [0, {len(self._labels)}), the places in the index, got "
                f"{int(ids[bad][0])}; let the reader read index.files without labels"
            )
        return xp.asarray(self._labels, device=ids.device)[ids]
