"""Turns the outputs of a DALI pipeline into torch batches, with a state that can be saved."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from nvidia.dali import Pipeline
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from scae_dali.data.broken import concerns_images, explain
from scae_dali.data.index import ImageIndex
from scae_dali.plan.order import Order, batches_per_epoch
from scae_dali.stage.table import COMMON, COMMON_WIDTH, columns_of
from scae_dali.stage.wiring import EachOnce

T = TypeVar("T")

_COLUMNS = columns_of(COMMON)
_TARGETS = {"label", "partner", "mu"}


@dataclass(kw_only=True)
class Batch:
    """A batch: what the network and the loss need on the pipeline's device, the rest on the CPU.

    images: float [B, 3, H, W], channels-last in memory where the pipeline gives NHWC.
    labels, partners: int64 [B], classes of the sample and of the one mixed into it.
    mu: float32 [B], the weight of `labels`.
    On the CPU: ids: int64 [B], places in the index; None where the pipeline does not give them.
    status: int64 [B], a methods.base.Status each.
    boxes: float32 [B, 4], (y, x, h, w) in pixels before the flip, of no area where none.
    windows: float32 [B, 4], (y, x, h, w) of the crop in shares of the full frame. flips: bool [B].
    """

    images: torch.Tensor
    labels: torch.Tensor
    partners: torch.Tensor
    mu: torch.Tensor
    ids: torch.Tensor | None
    status: torch.Tensor
    boxes: torch.Tensor
    windows: torch.Tensor
    flips: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with images, labels, partners and mu on this device, as Tensor.to moves them.

        The rest stays on the CPU.
        """
        move = partial(torch.Tensor.to, device=device, non_blocking=non_blocking)
        moved = {name: move(getattr(self, name)) for name in _ON_DEVICE}
        return replace(self, **moved)


_ON_DEVICE = ("images", "labels", "partners", "mu")


def ids_of(batch: Batch) -> torch.Tensor:
    """The ids of a batch, int64 [B]. Raises ValueError where its pipeline does not give them."""
    if batch.ids is None:
        raise ValueError(
            "batches must have ids here, got some without: return the ids from the pipeline too, "
            'and name them "id" in the outputs of the Loader'
        )
    return batch.ids


class ImageError(RuntimeError):
    """An image that DALI could not read or decode."""


class Loader:
    """Iterates over a pipeline whose reader is named "Reader" and pads its shards, or over one that
    is fed in an `order`.

    outputs: the pipeline's, by name: `images`, and either `plan` (PlanNodes.row) or any of `id`,
    `label`, `partner` and `mu` (Targets), at least one of the first two.
    drop_last: give only the batches that are full on every shard, so that all ranks take as many
    steps; without it the last batch may be smaller, and an empty one is left out. Samples that pad
    a shard never appear. position: batches of the epoch that a restored pipeline has given already;
    where that is all of them, the first `for` loop gives nothing.
    remedy: takes what an ImageError says of the files, and adds what to do about them.
    epoch: that of the next batch, counted from 0, or from what `load_state_dict` has loaded.

    A `for` loop gives an epoch, or what is left of it. The epoch is over once its last batch is
    given, whether or not anybody asks for another. Raises ImageError where DALI cannot read or
    decode an image; the pipeline is lost then.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        outputs: Sequence[str],
        index: ImageIndex,
        *,
        drop_last: bool,
        position: int = 0,
        order: Order | None = None,
        remedy: Callable[[str], str] = str,
    ) -> None:
        names = {*outputs}
        by_name = names <= {"images", "id", *_TARGETS} and names & {"id", "label"}
        if "images" not in names or not (names == {"images", "plan"} or by_name):
            raise ValueError(
                "outputs must be images and either plan, or id or label or both, which partner "
                f"and mu may follow, got {', '.join(outputs)}"
            )
        self._index, self._pipeline, self._remedy = index, pipeline, remedy
        self._run(pipeline.build)
        self._labels = torch.from_numpy(index.labels.copy())
        self._once: EachOnce | None = None
        if order is None:
            meta = pipeline.reader_meta().get("Reader")
            if meta is None:
                found = ", ".join(pipeline.reader_meta()) or "none"
                raise ValueError(
                    'the pipeline must have a reader named "Reader", got readers named '
                    f'{found}; pass name="Reader" to it, or an order to the Loader of a pipeline '
                    "without readers"
                )
            shards, epoch_size = meta["number_of_shards"], meta["epoch_size"]
            # DALI's own DROP goes by the smallest shard and then leaves batches of the larger ones
            # to the next epoch; PARTIAL keeps all shards in step.
            self._length: dict[str, Any] = {
                "reader_name": "Reader",
                "last_batch_policy": LastBatchPolicy.PARTIAL,
            }
            self._valid = None
            if "id" in outputs and epoch_size <= len(index):
                self._once = EachOnce(index)
        else:
            shards, epoch_size = order.num_shards, order.epoch_size
            self._length = {"size": order.batches * order.batch_size}
            self._valid = order.shard_size
        self._outputs, self._batch_size = list(outputs), pipeline.max_batch_size
        self._shards, self._epoch_size = shards, epoch_size
        self._dali: DALIGenericIterator | None = None  # until `start`
        self._batches = batches_per_epoch(epoch_size, self._batch_size, shards, drop_last=drop_last)
        if self._batches == 0:
            raise ValueError(
                f"batch_size must be at most the {epoch_size // shards} images of a shard, got "
                f"{self._batch_size}"
            )
        self._position = position  # of the next batch, within the epoch
        self._nothing_left = position >= self._batches
        self.epoch = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._batches

    def start(self) -> None:
        """Prepare the first batch now, and not when it is asked for. Raises what a `for` loop would
        raise at this batch. Does nothing where it is prepared."""
        if self._dali is not None:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Please set `reader_name`")  # there is no reader
            self._dali = self._run(
                lambda: DALIGenericIterator(
                    [self._pipeline], self._outputs, auto_reset=True, **self._length
                )
            )
        # A state of the epoch's end, as it was once saved, may have batches left to drop.
        if self._nothing_left and self._dali._counter > self._batch_size:
            self._finish_epoch()

    def __iter__(self) -> Iterator[Batch]:
        self.start()
        if self._nothing_left:
            self._nothing_left, self._position = False, 0
            return
        last = False
        while not last:
            try:
                (out,) = self._next()
            except StopIteration:
                self._position = 0
                return
            if self._valid is not None:
                left = max(0, self._valid - self._position * self._batch_size)
                out = {name: value[:left] for name, value in out.items()}
            self._position += 1
            last = self._position == self._batches
            batch = self._batch(out) if len(out["images"]) else None
            if last:  # before it is given: whoever counts batches asks for no more
                self._once = None
                self.epoch += 1
                self._finish_epoch()
            if batch is not None:
                yield batch

    def state(self) -> bytes:
        """The pipeline's state after the last batch given, to be passed as the `checkpoint` of a
        pipeline that is defined alike. After the last batch of an epoch it is the state at the
        beginning of the next one.
        """
        self.start()
        assert self._dali is not None
        return self._dali.checkpoints()[0]

    def state_dict(self) -> dict[str, Any]:
        """What a loader that is made alike needs to go on after the last batch given: the state of
        the pipeline (bytes), the epoch of the next batch and its place in it, and what its batches
        are counted by. After the last batch of an epoch, this is the beginning of the next one.
        """
        return {
            "pipeline": self.state(),
            "epoch": self.epoch,
            "position": self._position,
            "counts": self._counts(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. The next `for` loop gives what is left of the epoch.

        Raises RuntimeError where batches are prepared already, and ValueError for another state,
        or that of a loader with other batches, shards or images.
        """
        if self._dali is not None:
            raise RuntimeError(
                "load_state_dict must come before the first batch, got a loader that has prepared "
                "some; make a pipeline and a loader anew"
            )
        names = {*state} if isinstance(state, Mapping) else set()
        if not {"pipeline", "epoch", "position"} <= names:
            raise ValueError(
                "state must be what state_dict of a Loader gives, with pipeline, epoch and "
                f"position, got {', '.join(map(str, names)) or repr(state)}"
            )
        counts = self._counts()
        # Before counts were kept, nobody could tell.
        for name, value in state.get("counts", {}).items():
            if value != counts[name]:
                what = "index of other images or labels" if name == "index" else f"{name}={value}"
                raise ValueError(
                    f"the state is of a loader with {what}, and this one has "
                    f"{name}={counts[name]}, so it would go on elsewhere: make the pipeline "
                    "and the loader as they were, or begin anew without the state"
                )
        if not 0 <= state["position"] <= self._batches:
            raise ValueError(
                f"position must be in 0 … {self._batches}, the batches of an epoch, got "
                f"{state['position']}"
            )
        self._pipeline._checkpoint = state["pipeline"]
        self._pipeline._restore_state_from_checkpoint()
        self.epoch, self._position = state["epoch"], state["position"]
        self._once = None  # it looks at whole epochs alone

    def _counts(self) -> dict[str, int | str]:
        """What the batches are counted by. Only a state needs it: the hash of a large index takes a
        second."""
        return {
            "batch_size": self._batch_size,
            "num_shards": self._shards,
            "epoch_size": self._epoch_size,
            "index": self._index.fingerprint,
        }

    def _finish_epoch(self) -> None:
        """Drop what is left of the epoch; DALI's iterator then begins the next one by itself."""
        with suppress(StopIteration):
            while True:
                self._next()
        self._position = 0

    def _next(self) -> list[dict[str, torch.Tensor]]:
        assert self._dali is not None
        return self._run(self._dali.__next__)

    def _batch(self, out: dict[str, torch.Tensor]) -> Batch:
        images = out["images"]
        if images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        n = len(images)
        if "plan" in out:
            plan = out["plan"]
        else:
            plan = torch.zeros(n, COMMON_WIDTH, dtype=torch.float64)
            if "id" in out:
                ids = out["id"].reshape(n, 1).long().cpu()
                self._check_ids(ids[:, 0])
                plan[:, _COLUMNS["id"]] = ids.double()
                labels = self._labels[ids]
            else:
                labels = out["label"].reshape(n, 1)
            plan[:, _COLUMNS["label"]] = plan[:, _COLUMNS["partner"]] = labels.double()
            plan[:, _COLUMNS["mu"]] = 1.0
            plan[:, _COLUMNS["window"]] = torch.tensor([0.0, 0.0, 1.0, 1.0])
            for name in _TARGETS & out.keys():
                plan[:, _COLUMNS[name]] = out[name].reshape(n, 1).double()
        part = {name: plan[:, columns] for name, columns in _COLUMNS.items()}
        move = partial(torch.Tensor.to, device=images.device, non_blocking=True)
        return Batch(
            images=images,
            labels=move(part["label"][:, 0].long()),
            partners=move(part["partner"][:, 0].long()),
            mu=move(part["mu"][:, 0].float()),
            ids=part["id"][:, 0].long() if {"plan", "id"} & out.keys() else None,
            status=part["status"][:, 0].long(),
            boxes=part["box"].float(),
            windows=part["window"].float(),
            flips=part["flip"][:, 0].bool(),
        )

    def _check_ids(self, ids: torch.Tensor) -> None:
        """Raise where they are no places in the index, or come twice in the first epoch."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._index):
            raise IndexError(
                f"id must be in [0, {len(self._index)}), the places in the index, got "
                f"{int(ids.min())} … {int(ids.max())}; let the reader read index.files without "
                "labels, or with places as its labels"
            )
        if self._once is not None:
            self._once.look(ids.numpy())

    def _run(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except RuntimeError as error:
            # Without this, the traceback keeps the pipeline until the garbage collector runs, maybe
            # in a thread of the pipeline. That would wait for its own end and abort the process.
            self._pipeline._shutdown()
            if not concerns_images(str(error)):
                raise
            raise ImageError(self._remedy(explain(str(error), self._index))) from error
