"""The Python operator of a stage, as DALI runs it: many small arrays in, the rows of a plan out.

DALI hands every input over as a list with one array a sample. The operator joins them to arrays of
the batch, checks what can only be seen while the pipeline runs, and asks the planner.
"""

import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from nvidia.dali import Pipeline

from scae_dali.stage import wiring
from scae_dali.stage.graph import Origin
from scae_dali.stage.table import Planner


class Operator:
    """Ids, the batch's number and crop windows -> rows of the plan, in float64 and in float32.

    epoch: `counted` where the second input is the batch's number, from which the epoch is computed;
    `given` where it is the epoch; a number is the epoch of all batches, and there is no such input.
    frames: how many inputs describe the crop. size: (h, w) of the crops in pixels; None: it is the
    last input. told: what that input must be, if anything. origin: where ids come from, None where
    that is unknown. epoch_size, num_shards: of the reader, as the stage counts. spent: called with
    the seconds that each batch took.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        epoch: int | Literal["counted", "given"] = "counted",
        frames: int,
        size: tuple[int, int] | None,
        epoch_size: int,
        num_shards: int,
        spent: Callable[[float], None],
        origin: Origin | None = None,
        told: tuple[int, int] | None = None,
    ) -> None:
        self.planner = planner
        self._epoch, self._frames, self._size, self._told = epoch, frames, size, told
        self._epoch_size, self._num_shards, self._spent = epoch_size, num_shards, spent
        self._names, self._classes = planner.index.names(), planner.index.num_classes
        # A function that holds its pipeline would keep it alive for good.
        self._pipeline = weakref.ref(pipeline) if (pipeline := Pipeline.current()) else None
        counts = epoch == "counted"
        self._reader = None if origin is None or not counts else origin.reader
        self._once: wiring.EachOnce | None = None
        known = origin is None or self._reader is None or origin.kind == "File"
        if counts and not known and epoch_size <= len(planner.index):  # no sample is wanted twice
            self._once = wiring.EachOnce(planner.index)
        self._look_for_repeats = not counts and (origin is None or origin.kind != "File")

    def python(self, *inputs: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What fn.python_function calls."""
        start = time.perf_counter()
        rows = self.planner(*self.arguments(inputs))
        row, single = list(rows), list(rows.astype(np.float32))
        self._spent(time.perf_counter() - start)
        return row, single

    def torch(self, *inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        """What fn.dl_tensor_python_function calls, with DLPack capsules: the plan reads their
        memory and gives out its own."""
        import torch
        from torch.utils import dlpack

        start = time.perf_counter()
        arrays = [[dlpack.from_dlpack(one).numpy() for one in samples] for samples in inputs]
        rows = torch.from_numpy(self.planner(*self.arguments(arrays)))
        row, single = ([*map(dlpack.to_dlpack, table)] for table in (rows, rows.float()))
        self._spent(time.perf_counter() - start)
        return row, single

    def arguments(self, inputs: Sequence[list[np.ndarray]]) -> tuple[Any, ...]:
        """The planner's arguments, out of DALI's inputs."""
        ids, *rest = inputs
        b, number, epoch = len(ids), None, None
        if self._epoch == "counted":
            number = np.full(b, rest.pop(0)[0].item())  # the same for all samples of the batch
        elif self._epoch == "given":
            epoch = _epochs(rest.pop(0))
        else:
            epoch = np.full(b, self._epoch)
        if self._reader is not None:
            self._check_reader()
        if ids[0].dtype == np.uint8:  # names, as source_info gives them
            if ids[0].shape in ((), (1,)):
                raise TypeError(
                    "ids must be int32 or int64, or names, got one number of type uint8 a sample; "
                    "cast it to INT64"
                )
            positions = self._names.ids([bytes(name).decode() for name in ids])
        else:
            positions = self._positions(ids, number)
            self._warn_of_repeats(positions)
        frames = [_batch(samples) for samples in rest[: self._frames]]
        if self._size is None:
            size_px = _batch(rest[-1])[:, :2].astype(np.int64)
            if self._told is not None and (wrong := (size_px != self._told).any(axis=1)).any():
                raise ValueError(
                    f"size must be (h, w) of the images, got {self._told}, and images of "
                    f"{tuple(size_px[wrong][0].tolist())}; pass theirs, or leave size out"
                )
        else:
            size_px = np.full((b, 2), self._size)
        window = None
        if frames:
            frames[-1] = frames[-1][:, :2]  # HWC
            if any(frame.shape[1] != 2 for frame in frames):
                raise ValueError(
                    "window must be (start, size, shapes) of (y, x) and (h, w) each, got "
                    f"{[frame.shape[1] for frame in frames]} numbers"
                )
            window = np.concatenate(frames, axis=1).astype(np.float64)
            if len(frames) > 1:
                wiring.check_frames(window)
        return positions, number, size_px, window, epoch

    def _positions(self, ids: list[np.ndarray], number: np.ndarray | None) -> np.ndarray:
        """Ids that are numbers, int64 [B]."""
        each = _batch(ids)
        if each.shape[1] != 1:
            raise TypeError(
                f"ids must be one integer a sample, got {each.shape[1]} of {each.dtype}; pass the "
                "place in the index alone, or the name as uint8"
            )
        flat = each[:, 0]
        samples = len(self.planner.index)
        if flat.dtype.kind not in "iu" or np.iinfo(flat.dtype).max < samples - 1:
            raise TypeError(
                f"ids must be integers that hold the places 0 … {samples - 1}, got {flat.dtype}; "
                "pass the reader's own, or cast them to INT64"
            )
        positions = flat.astype(np.int64)
        within = (positions >= 0) & (positions < samples)  # the planner refuses others
        if self._once is not None and number is not None:
            step = int(number[0]) % self.planner.batches_per_epoch
            left = self._epoch_size // self._num_shards - step * self.planner.batch_size
            self._once.look(positions[: max(0, left)][within[: max(0, left)]])  # others pad
            if step + 1 == self.planner.batches_per_epoch:
                self._once = None
        return positions

    def _warn_of_repeats(self, ids: np.ndarray) -> None:
        """Warn, once, of a batch that has a sample twice, if its ids may be class labels."""
        if self._look_for_repeats and wiring.repeats(ids) and ids.max() < self._classes:
            self._look_for_repeats = False
            warnings.warn(
                "ids have a sample more than once in a batch; if they are class labels, erasing is "
                "guided by the wrong maps: let the reader read index.files without labels",
                RuntimeWarning,
                stacklevel=2,
            )

    def _check_reader(self) -> None:
        """Checks the reader, once, at the first batch: an unbuilt pipeline cannot be asked."""
        name, self._reader = self._reader, None
        pipeline = None if self._pipeline is None else self._pipeline()
        if pipeline is not None and name is not None:
            wiring.check_reader(
                name,
                pipeline.reader_meta(name),
                epoch_size=self._epoch_size,
                num_shards=self._num_shards,
                batch_size=self.planner.batch_size,
            )


def _batch(samples: list[np.ndarray]) -> np.ndarray:
    """Arrays of one size -> [B, size]; np.stack takes three times as long."""
    flat = samples if samples[0].ndim == 1 else [one.reshape(-1) for one in samples]
    return np.concatenate(flat).reshape(len(samples), -1)


def _epochs(samples: list[np.ndarray]) -> np.ndarray:
    """Epochs that the user gives, int64 [B]."""
    epochs = _batch(samples)
    if epochs.dtype.kind not in "iu" or epochs.shape[1] != 1:
        raise TypeError(
            f"epoch must be one integer a sample, got {epochs.shape[1]} of {epochs.dtype}; cast it "
            "to INT64"
        )
    if epochs.size and epochs.min() < 0:
        raise ValueError(f"epoch must be at least 0, got {epochs.min()}; count from 0")
    return epochs[:, 0].astype(np.int64)
