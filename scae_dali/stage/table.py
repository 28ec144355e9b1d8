"""A batch's whole plan as one table, a row a sample: crop, flip, labels, and the method's part.

It is made by NumPy, outside any DALI graph, and is pure: a row depends on (seed, epoch, id, window,
saliency) alone.
"""

from collections.abc import Callable
from itertools import accumulate

import numpy as np

from scae_dali.data.index import ImageIndex
from scae_dali.methods.base import Method, Run, Samples, Status
from scae_dali.plan import crop
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.mixing import draw_in_batch
from scae_dali.plan.order import ID
from scae_dali.plan.random import Stream, uniforms

# A row's columns by name, with their widths. First come those that every plan has: the classes of
# the sample and of its partner; its place in the index; its Status; the weight of its own label;
# the `box` (y, x, h, w) in pixels of the crop; the `window`, which is the crop in shares of the
# full frame; and `flip`, which is 0 where the planner does not draw it.
COMMON = {"label": 1, "partner": 1, "id": 1, "status": 1, "mu": 1, "box": 4, "window": 4, "flip": 1}
COMMON_WIDTH = sum(COMMON.values())
# Then the crop, where the planner draws it: start (y, x) and shape (h, w) in pixels of the full
# frame.
CROP = {"start": 2, "shape": 2}
# Then, where the method mixes, what the random numbers for the partner's crop hang on.
PARTNER_KEY = {"key": 1, "epoch": 1}
# Or, where partners are taken from the batch, the partner's position in it.
IN_BATCH = {"source": 1}
# Last come the method's own fields.


def columns_of(widths: dict[str, int]) -> dict[str, slice]:
    """Where each name lies in a row."""
    ends = list(accumulate(widths.values()))
    return {
        name: slice(end - width, end)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


class Planner:
    """Makes the table of a batch: ids, number of the batch and crop windows -> float64 [B, K].

    columns: where each name lies in a row. The epoch is start_epoch + iteration //
    batches_per_epoch. The method gets iteration + start_epoch · batches_per_epoch.
    random_crop: how the planner draws crop and flip; None: the window is given. keyed: ids are
    keys, see `Order.keys`, for epochs in which a sample may come twice. look: called with the last
    epoch of every batch, before it is planned. in_batch: the partners of mixed samples are others
    of their batch, instead of those of the whole index that the method plans.
    """

    def __init__(
        self,
        index: ImageIndex,
        method: Method,
        run: Run,
        *,
        batch_size: int,
        batches_per_epoch: int,
        start_epoch: int = 0,
        random_crop: CropConfig | None = None,
        keyed: bool = False,
        look: Callable[[int], None] | None = None,
        in_batch: bool = False,
    ) -> None:
        self.index = index
        self.keyed = keyed
        self.random_crop = random_crop
        self.mixes, self.pastes = method.mixes, method.pastes
        self.in_batch = in_batch and self.mixes
        cropped = {} if random_crop is None else CROP
        partner = IN_BATCH if self.in_batch else PARTNER_KEY if self.mixes else {}
        self.columns = columns_of(COMMON | cropped | partner | dict(method.fields))
        self._width = max(part.stop for part in self.columns.values())
        self._method, self._run, self._start_epoch = method, run, start_epoch
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self._labels, self._look = index.labels, look

    def __call__(
        self,
        ids: np.ndarray,
        iteration: np.ndarray | None,
        size_px: np.ndarray,
        window: np.ndarray | None = None,
        epoch: np.ndarray | None = None,
    ) -> np.ndarray:
        """The plan of one batch, or of several full ones in a row.

        ids: int64 [B], or keys. iteration: int64 [B], the number of the batch. epoch: int64 [B];
        None: it is computed from the number of the batch. Where it is given, the plan is of one
        batch of any size, and its number is made of the epoch and the first id. size_px: int64
        [B, 2], (H, W) of the crop as the network sees it. window: float64 [B, 6], start and shape
        of the crop and the shape of the upright image, in pixels; [B, 2], that shape alone, where
        the planner draws the crop; None: the whole image is seen. Raises IndexError for an id
        outside the index.
        """
        b = len(ids)
        keys, ids = ids, ids & ID if self.keyed else ids
        labels = self._label(ids, keys)
        if epoch is not None:
            batch_size = b
            iteration = np.full(b, (epoch[0] * len(self._labels) + ids[0]) % (1 << 32))
        else:
            assert iteration is not None
            batch_size = self.batch_size
            iteration = iteration + self._start_epoch * self.batches_per_epoch
            epoch = iteration // self.batches_per_epoch
        if self._look is not None and b:
            self._look(int(epoch.max()))
        extra: dict[str, np.ndarray] = {}
        flip = np.zeros(b, np.bool_)
        if self.random_crop is not None:
            if window is None:
                raise ValueError(
                    "window must be the shapes of the upright images where the crop is drawn here, "
                    "got None"
                )
            cut, flip = self._crop(Stream.CROP, keys, epoch, window, self.random_crop)
            extra = {"start": cut[:, :2], "shape": cut[:, 2:]}
            window = np.concatenate([cut, window], axis=1)
        if self.mixes and not self.in_batch:
            extra |= {"key": keys, "epoch": epoch}
        if window is None:
            share = np.tile([0.0, 0.0, 1.0, 1.0], (b, 1))
        else:
            share = window[:, :4] / np.tile(window[:, 4:], 2)
        position = np.arange(b)
        samples = Samples(
            ids=ids,
            keys=keys,
            labels=labels,
            epoch=epoch,
            window=share,
            size_px=size_px,
            iteration=iteration,
            place=position % batch_size,
            flip=flip,
        )
        plan = self._method.plan(samples)
        if self.in_batch:
            plan = self._with_partners_of_batch(plan, samples)
            extra |= {"source": plan["source"]}
        partner = labels
        if "partner_id" in plan:
            partner = self._label(plan["partner_id"], ids)
        elif "source" in plan:
            partner = labels[position - position % batch_size + plan["source"]]
        table = np.empty((b, self._width))
        for name, value in {
            "label": labels,
            "partner": partner,
            "id": ids,
            "status": plan["status"],
            "mu": plan.get("mu", 1.0),
            "box": plan.get("box", 0.0),
            "window": share,
            "flip": flip,
        }.items():
            wide = COMMON[name] > 1
            table[:, self.columns[name] if wide else self.columns[name].start] = value
        for name, value in (extra | {name: plan[name] for name in self._method.fields}).items():
            table[:, self.columns[name]] = value.reshape(b, -1)
        return table

    def _with_partners_of_batch(
        self, plan: dict[str, np.ndarray], samples: Samples
    ) -> dict[str, np.ndarray]:
        """A plan with partners of the same batch, and their positions in it as `source`.

        They are as they lie in the batch, so that nothing more need be known to settle the plan.
        """
        plan = {name: np.array(value) for name, value in plan.items()}
        plan["source"] = samples.place.copy()
        mixed = np.flatnonzero(plan["status"] & int(Status.MIXED))
        u = samples.draw(self._run, Stream.PARTNER, 2)[:, 1]
        rows = np.arange(len(samples.ids))
        begins = rows - samples.place
        for begin in np.unique(begins[mixed]):
            batch, mine = rows[begins == begin], mixed[begins[mixed] == begin]
            weights = self._method.partner_weights(samples.labels[mine], samples.labels[batch])
            plan["source"][mine] = draw_in_batch(u[mine], weights, samples.place[mine])
        partner = (begins + plan["source"])[mixed]
        plan["partner_id"][mixed] = samples.ids[partner]
        some = {name: value[mixed].astype(np.float64) for name, value in plan.items()}
        settled = self._method.settle(some, samples.window[partner], np.zeros(len(mixed), np.bool_))
        for name, value in settled.items():
            plan[name][mixed] = value
        plan["status"][mixed] += int(Status.MIXED_IN_BATCH) - int(Status.MIXED)
        return plan

    def settle(
        self, rows: np.ndarray, full_px: np.ndarray, config: CropConfig
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Settle the rows of mixed samples: let the method change its plan, now that the partners'
        sizes are known.

        rows, full_px: as partner_crop takes them. Returns the settled rows, and the partners'
        window and flip as partner_crop gives them.
        """
        window, flip = self.partner_crop(rows, full_px, config)
        plan = {
            name: rows[:, where] if where.stop - where.start > 1 else rows[:, where.start]
            for name, where in self.columns.items()
        }
        settled = rows.copy()
        for name, value in self._method.settle(plan, window / np.tile(full_px, 2), flip).items():
            settled[:, self.columns[name]] = value if value.ndim > 1 else value[:, None]
        return settled, window, flip

    def partner_crop(
        self, rows: np.ndarray, full_px: np.ndarray, config: CropConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Crop and flip of the partners of mixed samples.

        rows: float64 [n, K], of the mixed samples. full_px: int64 [n, 2], (h, w) of the partners'
        upright images. Returns window and flip as crop_and_flip does. If the planner draws the
        sample's own flip as well, that one is done after the mixing, to both, so the partner's is
        given relative to it.
        """
        key, epoch = (rows[:, self.columns[name].start].astype(np.int64) for name in PARTNER_KEY)
        window, flip = self._crop(Stream.PARTNER_CROP, key, epoch, full_px, config)
        if self.random_crop is not None:
            flip = flip != (rows[:, self.columns["flip"].start] == 1)
        return window, flip

    def _crop(
        self,
        stream: Stream,
        keys: np.ndarray,
        epoch: np.ndarray,
        full_px: np.ndarray,
        config: CropConfig,
    ) -> tuple[np.ndarray, np.ndarray]:
        u = uniforms(self._run.seed, stream, epoch, keys, crop.draws_per_sample(config))
        return crop.crop_and_flip(u, full_px, config)

    def _label(self, ids: np.ndarray, given: np.ndarray) -> np.ndarray:
        bad = (ids < 0) | (ids >= len(self._labels))
        if bad.any():
            raise IndexError(
                f"ids must be in [0, {len(self._labels)}), the places in the index, got "
                f"{int(given[bad][0])}; let the reader read index.files without labels"
            )
        return self._labels[ids]
