"""Estimates how fast a network trains on this machine, by a few steps on random images."""

from __future__ import annotations

import os
import time

import torch
from torch.nn.functional import cross_entropy

from pipelines.recipe import Config
from scae_dali.training.networks import make_network
from scae_dali.training.precision import autocast
from scae_dali.training.ranks import pick_device

__all__ = ["pace"]

STEPS = 3  # that are timed, after one more
ON_CPU = 32  # images in a step at most, on a CPU


def pace(config: Config, classes: int, jobs: int) -> float:
    """Seconds per image of a run beside `jobs` - 1 others, without its pipeline and validation.

    The network's memory format and precision are the config's.
    """
    torch.backends.cudnn.benchmark = True  # as train.py does
    device = pick_device(config.device)
    batch_size, threads = config.batch_size, torch.get_num_threads()
    if device.type == "cpu":
        batch_size = min(batch_size, ON_CPU)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    try:
        with torch.random.fork_rng():
            net = make_network(config.model, classes).to(device, memory_format=layout)  # type: ignore[call-overload]
            images = torch.randn(batch_size, 3, config.image.size, config.image.size)
        images = images.to(device, memory_format=layout)
        labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        optimizer = config.optim.optimizer([{"params": list(net.parameters())}])
        start = 0.0
        for step in range(1 + STEPS):
            if step == 1:
                start = _now(device)
            with autocast(config.amp, device):
                loss = cross_entropy(net(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return (_now(device) - start) / (STEPS * batch_size)
    finally:
        torch.set_num_threads(threads)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
