"""What guides a run: its saliency cache, and how the maps in it are kept up to date.

By passes over the images, by what training sees of them anyway (`harvest`), or by both. When maps
are due is decided by `schedule`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from pipelines.config import ExecConfig
from pipelines.loaders import Loaders
from pipelines.recipe import Config, autocast
from scae_dali import schedule
from scae_dali.cache import SaliencyCache
from scae_dali.dataset import ImageIndex
from scae_dali.gradcam import GradCAM
from scae_dali.harvest import Harvest
from scae_dali.ranks import Ranks
from scae_dali.refresh import PassReport, refresh_cache


class Guide:
    """The saliency maps of a run; make it before the network is compiled.

    cache: built offline, or the run's own, made where it is missing. harvest: what training sees;
    None where the maps come from passes alone. guided: the Config of the method that looks at them,
    or at nothing but neighbouring classes: then a pass makes no maps. made: the epoch of the last
    pass of this run.
    """

    def __init__(
        self,
        config: Config,
        guided: Any,
        net: nn.Module,
        index: ImageIndex,
        loaders: Loaders,
        ranks: Ranks,
    ) -> None:
        self._config, self._guided, self._net = config, guided, net
        self._index, self._loaders, self._ranks = index, loaders, ranks
        self._image = config.saliency_image()
        settings = config.saliency
        path = settings.cache or Path(config.out) / "saliency.lmdb"
        if guided.refresh_every:
            grid = GradCAM(net, settings.layer).grid(self._image.size)
            SaliencyCache.create(path, index, grid=grid, exist_ok=True)
            if schedule.pass_epoch(config.epochs - 1, guided.refresh_every) is None and ranks.first:
                tqdm.write(
                    f"note: no saliency pass comes within {config.epochs} epochs, the first is due "
                    f"at epoch {guided.refresh_every}; lower refresh_every",
                    file=sys.stderr,
                )
        self.cache = SaliencyCache(path, index=index)
        self.harvest = None
        self.made: int | None = None
        if settings.source != "pass" and guided.guided:
            self.harvest = Harvest(
                net,
                settings.layer,
                samples=len(index),
                num_classes=index.num_classes,
                grid=self.cache.meta.grid,
                size=config.image.size,
            )

    def due(self, epoch: int) -> int | None:
        """The epoch of the maps that must be made before this one is trained; None where none."""
        due = schedule.pass_epoch(epoch, self._guided.refresh_every)
        if due is None:
            return None
        meta = self.cache.meta
        # A cache that others have filled, or that was lost, is not this run's.
        made = self.made == meta.epoch == due and meta.under_way is None
        return None if all(self._ranks.gather(made)) else due

    def refresh(self, due: int, run: ExecConfig, *, mixes: bool) -> PassReport:
        """Bring the cache to this epoch; every rank calls it. run: as in training, the whole data
        for every rank. mixes: whether the method asks for neighbouring classes."""
        config = self._config
        if config.saliency.batch_size is None:
            run = run.for_inference(self._image.size)
        else:
            run = replace(run, batch_size=config.saliency.batch_size)
        share = config.saliency.share
        if config.saliency.source == "harvest" or not self._guided.guided:
            share = 0.0
        bar = tqdm(desc=f"saliency {due}", unit="img", disable=not self._ranks.first)

        def loader_for(ids):
            bar.reset(total=len(ids) * self._ranks.world)
            return self._loaders.saliency(self._image, run, ids)

        report = refresh_cache(
            self._net,
            self.cache if self._ranks.local == 0 else None,
            self._index,
            loader_for,
            epoch=due,
            share=share,
            harvest=self.harvest,
            layer=config.saliency.layer,
            name=config.model,
            input_size=self._image.size,
            neighbors=getattr(self._guided, "neighbors", 0) if mixes else 0,
            autocast=partial(autocast, config.amp, self._ranks.device),
            progress=bar.update,
        )
        bar.close()
        self.made = due
        if self.harvest is not None:
            self.harvest.clear()
        return report
