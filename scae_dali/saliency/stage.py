"""The stages that users make: they keep the maps that they look at up to date by themselves.

scae = SCAE(index, "maps.lmdb", epochs=100, batch_size=256, seed=7)
...
for epoch in range(100):
    scae.refresh(model, epoch)
    for batch in loader:
        ...
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from scae_dali.cache import SaliencyCache
from scae_dali.cache.format import checked_epoch
from scae_dali.checks import check
from scae_dali.data.index import ImageIndex
from scae_dali.plan import schedule
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.probe import own_tensor
from scae_dali.saliency.refresh import PassReport, refresh_cache
from scae_dali.saliency.sweep import asked_batches, rank_and_world
from scae_dali.saliency.whole import whole_loader
from scae_dali.stage import stage
from scae_dali.stage.loader import Batch

__all__ = ["SCAE", "Stage"]


class Stage(stage.Stage):
    __doc__ = stage.Stage.__doc__

    _made: int | None = None  # the epoch of the pass that was made last, by this process or before
    _first = True  # until the first call of `refresh`

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what a call gives besides the images, for `Loader`."""
        return stage.Targets._fields

    def refresh(
        self,
        model: nn.Module,
        epoch: int,
        *,
        loader_for: Callable[[Sequence[int]], Iterable[Batch]] | None = None,
        size: int | None = None,
        batch_size: int | None = None,
        share: float = 1.0,
        harvest: Harvest | None = None,
        layer: str | None = None,
        **settings: Any,
    ) -> PassReport | None:
        """Make the saliency pass that is due before `epoch`; None where none is due.

        Call it before every epoch, in every process. A pass is due every `refresh_every` epochs.
        The first one makes the cache if there is none. Batches that DALI has prepared already are
        planned with the older maps.

        model: as it trains; it is left as it is. loader_for: see refresh_cache; None reads the
        files of the index, on the model's device, and normalises them by the stage's mean and std.
        size: the side in pixels of the square to which images are resized; None: that of the
        training images, if the stage was called with it. batch_size: of a pass; None: the stage's.
        share, harvest, layer, settings: see refresh_cache. Where the method looks at neighbouring
        classes alone, a pass finds these, and makes no maps.

        Raises ValueError where the stage has no cache, or the size is not known, or where files
        cannot be normalised like the images of the stage.
        """
        own = own_tensor(model)
        due = _needed_by_any(self._due(epoch), own.device)
        self._trained = epoch
        if due is None:
            self._warn_of_older_maps()
            return None
        size = self._side(size)
        writes = int(os.environ.get("LOCAL_RANK", rank_and_world()[0])) == 0
        lookup = self._lookup
        assert lookup is not None
        cache = lookup.cache
        if loader_for is None:
            self._check_own_loader()
            settings.setdefault("settings", {"mean": self._run.mean, "std": self._run.std})
            loader_for = partial(
                whole_loader,
                self.index,
                size=size,
                mean=self._run.mean,
                std=self._run.std,
                batch_size=batch_size or self.batch_size,
                device_id=own.device.index if own.device.type == "cuda" else None,
            )
        else:
            _check_size(loader_for, size)
        if writes and cache is None:
            grid = GradCAM(model, layer).grid(size)
            cache = SaliencyCache.create(lookup.path, self.index, grid=grid, exist_ok=True)
        report = refresh_cache(
            model,
            cache if writes else None,
            self.index,
            loader_for,
            epoch=due,
            share=share if self._guided else 0.0,
            harvest=harvest if self._guided else None,
            layer=layer,
            input_size=size,
            neighbors=self._neighbors,
            **settings,
        )
        if lookup.cache is None:
            self.attach(cache or SaliencyCache(lookup.path, index=self.index))
        self._made = due
        if harvest is not None:
            harvest.clear()
        return report

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the last pass, to be saved with its checkpoint."""
        lookup = self._lookup
        cache = None if lookup is None else lookup.cache
        return {"pass": self._made, "token": None if cache is None else cache.meta.token}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the pass of a `state_dict`, if the cache still has its maps. If it has not,
        the pass that is due last is made anew."""
        names = {*state} if isinstance(state, dict) else set()
        check(
            {"pass", "token"} <= names,
            "state must be what state_dict of a stage gives, with pass and token, got "
            f"{', '.join(map(str, names)) or state!r}",
        )
        lookup = self._lookup
        cache = None if lookup is None else lookup.cache
        same = cache is not None and cache.meta.token == state["token"]
        self._made = state["pass"] if same else None

    def _due(self, epoch: int) -> int | None:
        """The epoch of the pass to be made before `epoch` is trained; None where none must be."""
        checked_epoch(epoch)
        check(
            self._lookup is not None,
            "cache must be given to a stage that makes saliency passes, got None; the path of a "
            "cache that is not there yet is enough",
        )
        wanted = self._guided or self._neighbors
        due = schedule.pass_epoch(epoch, self._refresh_every) if wanted else None
        return None if due == self._made else due

    def _warn_of_older_maps(self) -> None:
        """Warn, once, where the maps of something else guide the first epochs."""
        first, self._first = self._first, False
        cache = None if self._lookup is None else self._lookup.cache
        if not first or cache is None or self._made is not None or not self._guided:
            return
        found = cache.coverage().found
        if found and self._refresh_every and rank_and_world()[0] == 0:
            warnings.warn(
                f"saliency cache {cache.path!r} has maps of {found:,} samples that this run did "
                f"not make; they guide its erasing until its first pass at epoch "
                f"{self._refresh_every}: delete it for maps of this run alone, or pass "
                "refresh_every=0 where it was built to be used as it is",
                RuntimeWarning,
                stacklevel=3,
            )

    def _check_own_loader(self) -> None:
        """Raise ValueError where the stage cannot read the images of a pass by itself."""
        check(
            self._run.grey_levels,
            "loader_for must be given where the stage gets images that are normalised already (its "
            f"mean is {self._run.mean}), because it must normalise them alike: see whole_loader",
        )
        first = self.index.files[0]
        check(
            self.index.archives is not None or os.path.isfile(os.path.join(self.index.root, first)),
            f"loader_for must be given where the images are no files of the index ({first!r} is "
            "none): partial(whole_loader, images, ...) serves images in memory; an index by "
            "from_webdataset or from_tfrecord reads its own archives",
        )

    def _side(self, size: int | None) -> int:
        """The side of the whole images of a pass, in pixels."""
        if size is None and self.size is not None:
            size = max(self.size)
        if size is None:
            raise ValueError(
                "size must be the side of the images in a saliency pass, in pixels, got None; pass "
                "it here, or (h, w) of the training images where you call the stage"
            )
        check(
            isinstance(size, int | np.integer) and size >= 1,
            f"size must be the side of the images in a saliency pass, in pixels, got {size!r}",
        )
        return int(size)


def _check_size(loader_for: Callable[[Sequence[int]], Iterable[Batch]], size: int) -> None:
    """Raise ValueError where a user's loader gives images of another size than the maps are for.
    The first image is looked at."""
    for batch in asked_batches(loader_for([0]), [0]):
        height, width = batch.images.shape[2:]
        check(
            (height, width) == (size, size),
            f"size must be that of the images which loader_for gives, {height} x {width} pixels, "
            f"got {size}: pass size={max(height, width)}, or have loader_for stretch the images",
        )


def _needed_by_any(due: int | None, device: torch.device) -> int | None:
    """The pass that this process or another one needs. After a resume, a node may be another one,
    which has no cache, and all processes make a pass together."""
    if rank_and_world()[1] == 1:
        return due
    every = torch.tensor(due or 0, device=device)  # no pass is due before epoch 0
    distributed.all_reduce(every, distributed.ReduceOp.MAX)
    return int(every) or None


class SCAE(Stage):
    """The stage of SCAE. Keywords are those of Stage and the fields of methods.scae.Config.

    scae = SCAE(index, cache="imagenet.lmdb", epochs=100, batch_size=256, seed=7)
    images, targets = scae(images, ids, window=(start, size, shapes))
    """

    def __init__(
        self, index: ImageIndex, cache: SaliencyCache | str | os.PathLike[str], **keywords: Any
    ) -> None:
        super().__init__(index, "scae", cache=cache, **keywords)
