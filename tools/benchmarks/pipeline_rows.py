"""The rows of the benchmark `pipeline`: our methods, mixed samples, and other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from nvidia.dali import Pipeline

from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.data.longtail import profile
from scae_dali.methods.scae import Config as ScaeConfig
from scae_dali.plan.schedule import frequency
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage
from tools.benchmarks import native, peers
from tools.common.live import GUIDED, Counter, Row, acting, endless
from tools.common.made_up import long_tailed, packed, with_profile
from tools.common.source import Source

__all__ = ["IN_TARS", "Rows"]

IN_TARS = ", tars"  # the end of the names of rows that read tars

CIFAR_LT = profile(500, 100, 100)  # images of each class of CIFAR-100-LT


class Rows:
    """Rows that live at once, in `live`. new_cache: (name, index) -> a cache of random maps.

    counts: name of one of our rows -> how many samples are mixed. baselines: name of a row -> name
    of the row that its ratio is to.
    """

    def __init__(
        self,
        source: Source,
        image: ImageConfig,
        execution: ExecConfig,
        new_cache: Callable[[str, ImageIndex], SaliencyCache],
    ) -> None:
        self._source, self._image, self._execution, self._new_cache = (
            source,
            image,
            execution,
            new_cache,
        )
        self._cache = new_cache("maps", source.index)
        self._ahead = source.ahead(execution)
        self._device = "cpu" if execution.device_id is None else f"cuda:{execution.device_id}"
        self.live: dict[str, Row] = {}
        self.counts: dict[str, Counter] = {}
        self.baselines: dict[str, str] = {}

    def add_methods(self, methods: Sequence[str], backends: Sequence[str]) -> None:
        """A row for each method, and a second one for `none`."""
        for method in methods:
            if method != "scae" or {"python", "numpy"} & {*backends}:
                self._ours(method, method)
            if method == "scae" and "torch" in backends:
                self._ours("scae (torch)", method, backend="torch")
        self._ours("none (again)", "none")

    def add_long_tail(self) -> None:
        """SCAE where classes are as large as those of CIFAR-100-LT."""
        tailed = self._source.relabelled(with_profile(self._source.index, CIFAR_LT))
        cache = self._new_cache("long tail", tailed.index)
        self._ours("scae, long tail", "scae", source=tailed, cache=cache)

    def add_mixed(self, share: float) -> None:
        """SCAE that mixes this share of the samples, and SCAE on the same data with mix_prob=0."""
        label = f"{100 * share:g}%"
        tailed = self._source.relabelled(with_tail(self._source.index, share))
        cache = self._new_cache(label, tailed.index)
        for name, mix_prob in ((f"unmixed {label}", 0.0), (f"mixed {label}", 0.5)):
            self._ours(
                name,
                "scae",
                source=tailed,
                cache=cache,
                baseline=f"unmixed {label}",
                mix_prob=mix_prob,
            )

    def add_tars(self, methods: Sequence[str], folder: str, tars: int) -> None:
        """The methods on the same images in tars."""
        source = self._source.relabelled(packed(self._source.index, folder, tars))
        for method in methods:
            self._ours(f"{method}{IN_TARS}", method, source=source)

    def add_native(self, methods: Sequence[str]) -> None:
        """DALI's own counterparts, and parts of our pipeline alone."""
        index, image, execution = self._source.index, self._image, self._execution
        self._add("native none", Row(native.plain(index, image, execution), self._ahead))
        for method in methods:
            if augment := native.COUNTERPARTS.get(method):
                stage = self._stage("none")
                pipeline = native.augmented_pipeline(stage, image, execution, augment)
                self._add(f"native {method}", self._row(pipeline, stage))
        self._add("decode alone", Row(native.decoded(index, execution), self._ahead))
        for method in methods:
            if method in ("none", "scae"):
                stage = self._stage(method)
                plans = native.undecoded(stage, image, execution)
                self._add(f"undecoded {method}", Row(plans, self._ahead, stage))

    def add_torchvision(self, methods: Sequence[str]) -> None:
        for method in methods:
            if method in peers.BY_TORCHVISION:
                self._workers(f"torchvision {method}", peers.torchvision, method)
        for decoder in list(peers.DECODERS)[1:]:
            by = partial(peers.torchvision, decoder=decoder)
            self._workers(decoder, by, "random_erasing")

    def add_timm(self, methods: Sequence[str]) -> None:
        for method in methods:
            if method in peers.BY_TIMM:
                self._workers(f"timm {method}", peers.timm, method)

    def _ours(
        self,
        name: str,
        method: str,
        *,
        source: Source | None = None,
        cache: SaliencyCache | None = None,
        baseline: str = "none",
        **settings: Any,
    ) -> None:
        source = source or self._source
        stage = self._stage(method, source.index, cache, **settings)
        loader = source.loader(stage, self._image, self._execution)
        self.counts[name] = Counter()
        self._add(name, Row(self.counts[name](endless(loader)), self._ahead, stage), baseline)

    def _stage(
        self,
        method: str,
        index: ImageIndex | None = None,
        cache: SaliencyCache | None = None,
        **settings: Any,
    ) -> Stage:
        return Stage(
            index or self._source.index,
            method,
            batch_size=self._execution.batch_size,
            cache=cache or self._cache,
            **GUIDED,
            **acting(method),
            **settings,
        )

    def _row(self, pipeline: Pipeline, stage: Stage) -> Row:
        loader = Loader(pipeline, files.OUTPUTS, stage.index, drop_last=False)
        return Row((batch.images for batch in endless(loader)), self._ahead, stage)

    def _workers(
        self, name: str, batches: Callable[..., Iterator[torch.Tensor]], method: str
    ) -> None:
        """A DataLoader with as many workers as DALI has threads."""
        execution = self._execution
        images = batches(
            self._source.index,
            self._image,
            method=method,
            batch_size=execution.batch_size,
            workers=execution.threads,
            device=self._device,
        )
        self._add(name, Row(images, execution.threads * (peers.AHEAD + 1)))

    def _add(self, name: str, row: Row, baseline: str = "none") -> None:
        self.live[name], self.baselines[name] = row, baseline


def with_tail(index: ImageIndex, share: float) -> ImageIndex:
    """The same images with a tail so large that this share of them is mixed."""
    if round(share * len(index)) < 1:
        raise SystemExit(
            f"--mixed-share {share:g} of {len(index)} images is less than one image; pass a larger "
            "share, or a larger --repeat"
        )
    tailed = long_tailed(index, 2 * share)
    if frequency(tailed.class_counts)[1:].max() >= ScaeConfig().tail:
        raise SystemExit(
            f"--data gives {len(index)} images, too few for a tail; pass a larger --repeat"
        )
    return tailed
