"""The metrics of a network on the validation images, after an epoch or of given weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.config import ExecConfig
from pipelines.data import open_data
from pipelines.loaders import Loaders
from pipelines.recipe import Config
from pipelines.resume import flat
from scae_dali.stage.loader import Loader
from scae_dali.training.evaluation import Evaluation
from scae_dali.training.networks import check_fits, make_network
from scae_dali.training.precision import autocast
from scae_dali.training.ranks import Ranks
from scae_dali.training.weights import load_weights

# Settings that `Config.post_hoc` depends on.
ADJUSTED_BY = ("sampling", "loss.logit_adjust", "loss.class_balanced", "data.imbalance")


@torch.inference_mode()
def validate(
    config: Config,
    model: nn.Module,
    loader: Loader,
    class_counts: np.ndarray,
    ranks: Ranks,
    *,
    adjusted: bool = True,
) -> dict[str, Any]:
    """The metrics on the images of all ranks, by their names in metrics.jsonl. Every rank calls it.

    class_counts: int64 [K], of the training set. adjusted: whether figures after post-hoc logit
    adjustment are wanted. The model is left in eval mode.
    """
    model.eval()
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    post_hoc = config.post_hoc(class_counts) if adjusted else None
    evaluation = Evaluation(class_counts, ranks.device, post_hoc)
    for batch in loader:
        with autocast(config.amp, ranks.device):
            logits = model(batch.images.contiguous(memory_format=layout))
        evaluation.update(logits, batch.labels)
    return evaluation.compute(ranks)


def evaluate(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The metrics of the network with `config.weights`. Nothing is trained or written.

    Raises ValueError where no weights are given, or they do not fit.
    """
    if config.weights is None:
        raise ValueError("--evaluate needs weights, got none: give --weights FILE, a state_dict")
    data = open_data(config.data, config.threads, ranks)
    net = make_network(config.model, data.train.num_classes, config.image.size)
    if (note := load_weights(net, config.weights)) and ranks.first:
        print(f"note: {note}", file=sys.stderr)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    net.to(ranks.device, memory_format=layout)  # type: ignore[call-overload]
    classes = data.train.num_classes
    check_fits(net, config.model, config.image.size, classes, ranks.device, amp=config.amp)
    execution = ExecConfig(
        batch_size=config.batch_size,
        device_id=ranks.device.index,
        threads=config.threads,
        hw_decoder_load=config.hw_decoder_load,
        shard=ranks.rank,
        num_shards=ranks.world,
    )
    loaders = Loaders(data, config.image, sampling="shuffle", seed=config.seed)
    loader = loaders.val(execution.for_inference(config.image.size))
    other = ranks.gather(trained_otherwise(config))[0]  # a node may lack the file
    if other and ranks.first:
        print(f"note: {other}", file=sys.stderr)
    return validate(config, net, loader, data.train.class_counts, ranks, adjusted=not other)


def trained_otherwise(config: Config) -> str:
    """What tells that the run of the weights was trained with other settings of those on which
    adjusted figures depend; empty where nothing tells it."""
    file = Path(config.weights or "").parent / "config.json"
    try:
        its = flat(json.loads(file.read_bytes()))
    except (OSError, ValueError, AttributeError):
        return ""  # not of a run
    mine = flat(config)
    odd = [
        f"{name} {its[name]}, not {mine[name]}"
        for name in ADJUSTED_BY
        if its.get(name, mine[name]) != mine[name]
    ]
    if not odd:
        return ""
    return (
        f"the weights were trained with {' and '.join(odd)}, so figures that end in _adjusted "
        f"would be wrong, and are left out: validate with --config {file} --weights "
        f"{config.weights}"
    )
