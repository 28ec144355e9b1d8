"""A stage in DALI's dynamic mode, where operators run as they are called, without a pipeline."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import types

from scae_dali.methods import erasing
from scae_dali.methods.base import Method
from scae_dali.methods.rectangle import Rectangle
from scae_dali.stage.operator import Operator
from scae_dali.stage.table import Planner
from scae_dali.stage.wiring import check_window

Values = Any  # what holds a value a sample: ndd.Batch, array or tensor [B, ...], list of arrays


class Dynamic:
    """Fills rectangles of batches of dynamic mode; see `Stage.dynamic`.

    method: of the stage. planner: its planner. operator: makes the operator of how it is fed, which
    takes the arguments of the plan out of the batch.

    Raises ValueError for a method that does anything else to images, or where samples are mixed.
    """

    def __init__(self, method: Method, planner: Planner, operator: Callable[..., Operator]) -> None:
        if method.mixes or type(method).apply is not Rectangle.apply:
            raise ValueError(
                "method must fill one rectangle in dynamic mode, as scae without mixing, "
                f"random_erasing and cutout do, got {type(method).__module__}: use a pipeline, or "
                "pass mix_prob=0 where samples of rare classes are mixed"
            )
        if method.config.fill == "noise":
            raise ValueError(
                'fill must not be "noise" in dynamic mode, which draws none here: choose "color", '
                "or use a pipeline"
            )
        self._method, self._planner, self._make_operator = method, planner, operator
        self._operators: dict[int, Operator] = {}  # by how many inputs describe the crop
        self._looked_at = not method.run.grey_levels  # whether images were seen to be grey levels

    def __call__(
        self, images: Any, ids: Values, epoch: int, window: Sequence[Values] | None
    ) -> tuple[Any, tuple[Any, ...]]:
        """The images with filled rectangles, and label, partner and μ."""
        import nvidia.dali.experimental.dynamic as ndd

        if not isinstance(images, ndd.Batch):
            raise TypeError(
                f"images must be a Batch of DALI's dynamic mode, got {type(images).__name__}; "
                'ndd.as_batch(images, layout="HWC") makes one'
            )
        if images.layout != "HWC":
            raise ValueError(
                f"images must be HWC, got {images.layout or 'no layout'}; call the stage before "
                "the normalisation or the transposition"
            )
        sizes = [np.array(shape) for shape in images.shape]
        if other := {int(size[2]) for size in sizes} - {3}:
            raise ValueError(f"images must have 3 channels, got {other.pop()}; decode them as RGB")
        self._look_at(images)
        if window is not None:
            check_window(window)
        frames = () if window is None else tuple(_arrays(one) for one in window)
        wanted = _arrays(ids)
        for name, values in (("ids", wanted), *(("window", frame) for frame in frames)):
            if len(values) != len(sizes):
                raise ValueError(
                    f"{name} must have a value for each of the {len(sizes)} images, got "
                    f"{len(values)}"
                )
        epochs = [np.array([epoch])] * len(wanted)
        operator = self._operator(len(frames))
        rows = self._planner(*operator.arguments([wanted, epochs, *frames, sizes]))
        plan = _Table(rows, self._planner)
        method = self._method
        filled = ndd.erase(
            images,
            anchor=plan.part("box", types.FLOAT, slice(0, 2)),
            shape=plan.part("box", types.FLOAT, slice(2, 4)),
            fill_value=erasing.fill_value(plan, method.run, method.config),
            axis_names="HW",
        )
        targets = (
            plan.part("label", types.INT64),
            plan.part("partner", types.INT64),
            plan.part("mu", types.FLOAT),
        )
        return filled, targets

    def _operator(self, frames: int) -> Operator:
        """One for all batches: it remembers which names it has seen."""
        if frames not in self._operators:
            self._operators[frames] = self._make_operator(
                self._planner, epoch="given", frames=frames, size=None
            )
        return self._operators[frames]

    def _look_at(self, images: Any) -> None:
        """Raise ValueError where images of floats are no grey levels; the first batch is looked at.

        In a pipeline the graph tells.
        """
        if self._looked_at or not len(images.shape):
            return
        self._looked_at = True
        if not str(images.dtype).startswith("f"):
            return
        every = [np.asarray(one) for one in images.cpu().tensors]
        low, high = float(min(map(np.min, every))), float(max(map(np.max, every)))
        if low < 0 or 0 < high <= 1:
            raise ValueError(
                f"images must be in grey levels 0 … 255 where mean is {self._method.run.mean}, got "
                f"values from {low:.3g} to {high:.3g}; call the stage before the normalisation, or "
                "pass the mean and std that its images have"
            )


class _Table:
    """The plan of a batch, with its columns by name, as batches on the CPU."""

    def __init__(self, rows: np.ndarray, planner: Planner) -> None:
        self._rows, self._planner = rows, planner

    def part(self, name: str, dtype: types.DALIDataType, within: slice = slice(None)) -> Any:
        import nvidia.dali.experimental.dynamic as ndd

        columns = self._rows[:, self._planner.columns[name]][:, within]
        return ndd.as_batch(columns.astype(types.to_numpy_type(dtype)))


def _arrays(values: Values) -> list[np.ndarray]:
    """A value a sample, as arrays of at least one dimension. Names are encoded."""
    each: Iterable[Any] = values.cpu().tensors if hasattr(values, "tensors") else values
    return [
        np.frombuffer(one.encode(), np.uint8)
        if isinstance(one, str)
        else np.atleast_1d(np.asarray(one))
        for one in each
    ]
