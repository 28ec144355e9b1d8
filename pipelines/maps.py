"""The saliency maps of a run: its cache, and how the maps in it are kept up to date.

Passes over the images make them, or the forward passes of training do (`harvest`), or both.
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
from pipelines.recipe import Config
from scae_dali.cache import SaliencyCache
from scae_dali.cache.format import check_last_pass, check_neighbors, describe_pass, pass_token
from scae_dali.checks import check
from scae_dali.data.index import ImageIndex
from scae_dali.plan import schedule
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.layers import unwrap
from scae_dali.saliency.refresh import PassReport, refresh_cache, weights_digest
from scae_dali.training.precision import autocast
from scae_dali.training.ranks import Ranks, nodes_that_see, together


class Maps:
    """The saliency maps of a run. Make it before the network is compiled.

    cache: built offline, or the run's own, which is made if it is missing and claimed for the run;
    each node has one. harvest: gathers maps while the network trains; None if they come from passes
    alone. guided: the Config of the method that looks at the maps. It may look at neighbouring
    classes alone: then a pass makes no maps. neighbors: how many neighbouring classes the method
    asks for. made: the token of this run's last pass, see `CacheMeta.token` (all tokens if the
    passes of several nodes differ); None before the first. In a checkpoint of an older version it
    is the epoch of that pass.

    Raises ValueError where the run could not keep its maps: too many epochs or classes, a cache
    that another process writes to, that several nodes share, or that has no maps and gets none.
    """

    def __init__(
        self,
        config: Config,
        guided: Any,
        net: nn.Module,
        index: ImageIndex,
        loaders: Loaders,
        ranks: Ranks,
        *,
        neighbors: int = 0,
    ) -> None:
        self._config, self._guided, self._net = config, guided, net
        self._index, self._loaders, self._ranks = index, loaders, ranks
        self._image, self._neighbors = config.saliency_image(), neighbors
        settings = config.saliency
        path = Path(settings.cache or Path(config.out) / "saliency.lmdb")
        if guided.refresh_every:
            check_last_pass(config.epochs, guided.refresh_every)
            check_neighbors(neighbors, index.num_classes)
            path = path_of_node(path, ranks, chosen=bool(settings.cache))
            with autocast(config.amp, ranks.device):
                grid = GradCAM(net, settings.layer).grid(self._image.size)
            self.cache = SaliencyCache.create(path, index, grid=grid, exist_ok=True)
            together(ranks, self.cache.claim if ranks.local == 0 else None)
            if schedule.pass_epoch(config.epochs - 1, guided.refresh_every) is None:
                self._note(
                    f"no saliency pass comes within {config.epochs} epochs, the first is due "
                    f"at epoch {guided.refresh_every}; lower refresh_every"
                )
        else:
            self.cache = SaliencyCache(path, index=index)
            if guided.guided:
                self._note_missing_maps()
        self.harvest = None
        self.made: str | int | None = None
        self._lost = False  # whether the maps of the last pass are gone, or another run's
        self._trained = False  # whether an epoch has begun
        if settings.source != "pass" and guided.guided:
            with autocast(config.amp, ranks.device):
                self.harvest = Harvest(
                    net,
                    settings.layer,
                    samples=len(index),
                    num_classes=index.num_classes,
                    grid=self.cache.meta.grid,
                    size=config.image.size,
                )

    def due(self, epoch: int) -> int | None:
        """The epoch of the pass that must be made before `epoch` is trained; None if none must."""
        refresh_every = self._guided.refresh_every
        due = schedule.pass_epoch(epoch, refresh_every)
        if due is None:
            if refresh_every and not self._trained:
                self._note_older_maps()
            self._trained = True
            return None
        self._trained = True
        # A cache that was lost, or that another run has filled, is not this run's.
        tokens, epochs = self._last_passes()
        if isinstance(self.made, int) and epochs == {self.made} and not self._shared():
            self.made = tokens or self.made
        if tokens is not None and tokens == self.made and epochs == {due}:
            return None
        self._lost = self.made is not None and self._guided.guided and not self._is_ours(due)
        if self._lost:
            meta = self.cache.meta
            last = meta.under_way or meta.last_pass
            found = "no pass" if last["epoch"] is None else f"one of {describe_pass(last)}"
            advice = "; give each run a saliency.cache of its own" if self._shared() else ""
            self._note(
                f"saliency cache {self.cache.path!r} no longer has the maps that this run made "
                f"before its checkpoint (its last pass is {found}): all maps are made anew, with "
                f"the present weights, for epoch {due}{advice}"
            )
        return due

    def refresh(self, due: int, execution: ExecConfig) -> PassReport:
        """Bring the cache to epoch `due`; every rank calls it.

        execution: as in training, but not sharded: every rank is given ids of its own.
        """
        config = self._config
        if config.saliency.batch_size is None:
            execution = execution.for_inference(self._image.size)
        else:
            execution = replace(execution, batch_size=config.saliency.batch_size)
        # If a pass made fewer, maps of another run would go on guiding this one.
        share = 1.0 if self._lost else self._share()
        bar = tqdm(desc=f"saliency {due}", unit="img", disable=not self._ranks.first)

        def loader_for(ids):
            bar.reset(total=len(ids) * self._ranks.world)
            return self._loaders.saliency(self._image, execution, ids)

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
            settings={
                "mean": config.image.mean,
                "std": config.image.std,
                "amp": config.amp,
            },
            neighbors=self._neighbors,
            autocast=partial(autocast, config.amp, self._ranks.device),
            progress=bar.update,
        )
        bar.close()
        self.made, _ = self._last_passes()
        self._lost = False
        if self.harvest is not None:
            if report.harvested == 0 and config.saliency.source == "harvest":
                self._note(
                    f"no map was harvested before epoch {due}. An image that is mixed, or erased "
                    "by several rectangles, gives none: lower the prob of the method that does so, "
                    "or give --saliency.source pass"
                )
            self.harvest.clear()
        return report

    def _last_passes(self) -> tuple[str | None, set[int | None]]:
        """Tokens of the last complete pass in the caches of all nodes, and their epochs; every rank
        calls it. No token where one of them has none."""
        meta = self.cache.meta
        found = self._ranks.gather((meta.token, meta.epoch))
        tokens = list(dict.fromkeys(token for token, _ in found))
        return None if None in tokens else "+".join(tokens), {epoch for _, epoch in found}

    def _shared(self) -> bool:
        """Whether other runs may use this cache: they may if the user has named it."""
        return bool(self._config.saliency.cache)

    def _share(self) -> float:
        """The share of the samples that a pass sees, in [0, 1]."""
        settings = self._config.saliency
        return 0.0 if settings.source == "harvest" or not self._guided.guided else settings.share

    def _is_ours(self, due: int) -> bool:
        """Whether all passes in the cache are of this run; every rank calls it.

        The last complete pass must be that of `made`. It, or the one under way, may also be the one
        that is due now, if the run ended before it was in a checkpoint.
        """
        meta = self.cache.meta
        if isinstance(self.made, int):
            ours = meta.epoch == self.made and not self._shared()
        else:
            ours = pass_token(meta.last_pass) in (self.made or "").split("+")
        if self._ranks.local == 0 and (not ours or meta.under_way is not None):
            now = (due, weights_digest(unwrap(self._net)))
            ours = ours or (meta.epoch, meta.weights) == now
            if (begun := meta.under_way) is not None:
                # A pass of all samples was begun because the maps of this run were lost.
                remade = begun["part"] is None and self._share() < 1
                ours = ours and (begun["epoch"], begun["weights"]) == now and not remade
        return all(self._ranks.gather(ours or self._ranks.local > 0))

    def _note_older_maps(self) -> None:
        """Note if maps of another run guide this one until its first pass."""
        if self.made is not None or not self._guided.guided or not self._ranks.first:
            return
        found, _ = self.cache.coverage()
        if found:
            every = self._guided.refresh_every
            settings = self._config.saliency
            some = settings.source != "pass" or settings.share < 1
            until = "its passes have replaced them, the first" if some else "its first pass,"
            self._note(
                f"saliency cache {self.cache.path!r} has maps of {found:,} samples that this run "
                f"did not make; they guide its erasing until {until} at epoch {every}: "
                "name another saliency.cache, or none, for maps of its own alone"
            )

    def _note_missing_maps(self) -> None:
        """Note which maps a cache that was built offline lacks; every rank calls it.

        Raises ValueError where there are none.
        """
        samples = len(self._index)
        every = self._ranks.gather(self.cache.coverage() if self._ranks.local == 0 else None)
        known = [coverage for coverage in every if coverage is not None]
        found, flat = min(one.found for one in known), max(one.flat for one in known)
        remedy = "run `scae-dali build-cache`, which makes what is missing"
        check(
            found > 0,
            f"saliency cache {self.cache.path!r} has no maps, and refresh_every=0 makes none: "
            f"{remedy}, or refresh every so many epochs",
        )
        if found < samples:
            self._note(
                f"saliency cache {self.cache.path!r} has maps of {found:,} of {samples:,} samples; "
                f"the others are erased uniformly: {remedy}"
            )
        if flat:
            self._note(
                f"{flat:,} of {found:,} maps in saliency cache {self.cache.path!r} are flat (the "
                "same everywhere); their samples are erased uniformly"
            )

    def _note(self, text: str) -> None:
        if self._ranks.first:
            tqdm.write(f"note: {text}", file=sys.stderr)


def path_of_node(path: Path, ranks: Ranks, *, chosen: bool) -> Path:
    """Where the cache of this node is; every rank calls it.

    LMDB cannot be written from two machines. If nodes see the same folder, all but the first put a
    number behind the name. chosen: whether the user has named the path; then this raises ValueError
    instead.
    """
    own = min(nodes_that_see(Path(path).resolve().parent, ranks)) == ranks.node
    check(
        all(ranks.gather(own)) or not chosen,
        f"saliency.cache must be on a disk of the node's own where it is refreshed, got {path!s}, "
        "which several nodes see (LMDB cannot be written from two machines): name a folder of the "
        "node, or leave it out for one cache a node in out",
    )
    if own:
        return path
    return path.with_name(f"{path.stem}-node{ranks.node}{path.suffix}")
