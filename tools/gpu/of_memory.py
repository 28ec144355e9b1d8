"""Checks of mixing, of images in memory, and of the small network that is trained on them.

They make their own long-tailed data, so that samples are mixed: the Setup's files with other
labels, or random pixels.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipelines.config import ImageConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from scae_dali.methods import BUILT_IN, Status
from scae_dali.plan.crop import CropConfig
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.refresh import refresh_cache
from scae_dali.stage.loader import Batch, Loader
from scae_dali.training.losses import Loss, LossConfig
from scae_dali.training.networks import make_network
from scae_dali.training.optim import EMA
from scae_dali.training.precision import autocast
from tools.common.live import memory_loader
from tools.common.made_up import long_tailed, random_cache, random_images
from tools.gpu.checks import (
    BATCH,
    SEED,
    TENSORS,
    Setup,
    check,
    compare,
    execution,
    image_config,
    no_waiting,
    product,
    scae_stage,
    step,
    train_loader,
    users_own,
)

SIDE = 32
SAMPLES = 6 * BATCH - 3  # of random pixels: the last batch is not full
MIXING: dict[str, Any] = {"mix_prob": 0.7, "tail": 0.5, "p_min": 0.5, "p_max": 0.5}
RARELY = MIXING | {"mix_prob": 0.3}  # so that some batches have no partner to fetch
CAM_DIFFERENCE = 0.01  # allowed mean absolute difference of maps in [0, 1]
LOSS_DIFFERENCE = 0.05  # allowed for bfloat16, relative to max(loss, 1); on a CPU it is 0.01


def with_tail(setup: Setup, folder: str, grid: tuple[int, int] = (7, 7)) -> Setup:
    """The same files with a long tail, and random maps of them."""
    index = long_tailed(setup.index, 1 / 3)
    cache = random_cache(os.path.join(folder, "tail.lmdb"), index, grid)
    return replace(setup, index=index, cache=cache)


def in_memory(setup: Setup, folder: str) -> tuple[Setup, np.ndarray]:
    """Random pixels, uint8 [N, H, W, 3], instead of the files; with a long tail."""
    images = random_images(SAMPLES, SIDE)
    return with_tail(replace(setup, index=images.index), folder, (8, 8)), images.pixels


def memory_image(tensor: str) -> ImageConfig:
    crop = CropConfig(kind="pad")
    return replace(image_config(tensor), size=SIDE, val_resize=SIDE, crop=crop)


def train_batches(
    setup: Setup, device_id: int | None, pixels: np.ndarray, method: str, tensor: str
) -> Loader:
    settings = MIXING if method == "scae" else {}
    stage = scae_stage(setup, method, **settings)
    image, execute = memory_image(tensor), execution(device_id)
    return memory_loader(stage, pixels, image, execute, drop_last=False)


def compare_maps(reference: np.ndarray, ours: np.ndarray) -> str:
    """Raise AssertionError unless maps, float [N, h, w] in [0, 1], agree; returns how well."""
    difference = float(np.abs(reference - ours).mean())
    assert reference.std() > 0.05, "the maps are constant"
    assert difference <= CAM_DIFFERENCE, (
        f"maps differ by {difference:.4f} on average, allowed is {CAM_DIFFERENCE}"
    )
    return f"mean |difference| {difference:.4f}"


def mixed(batches: list[Batch]) -> str:
    """Raise AssertionError unless some samples were mixed, and not all."""
    status = torch.cat([batch.status for batch in batches])
    n = int((status & int(Status.MIXED) > 0).sum())
    assert 0 < n < len(status), f"{n} of {len(status)} samples were mixed"
    return f", {n} mixed"


def three_epochs(
    setup: Setup, make: Callable[[Setup, int | None], Loader]
) -> tuple[list[Batch], list[Batch]]:
    """What make(setup with a tail, device_id) gives on the CPU and on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        tailed = with_tail(setup, folder)
        one, other = (make(tailed, where) for where in (None, setup.device_id))
        return [*one, *one, *one], [*other, *other, *other]


@check(*product("mix", ("roi", "full"), TENSORS))
def mix_pipeline(setup: Setup, decode: str, tensor: str) -> str:
    reference, ours = three_epochs(
        setup, lambda tailed, where: train_loader(tailed, where, "scae", decode, tensor, **RARELY)
    )
    said = compare(reference, ours) + mixed(ours)
    without = sum(Status.MIXED not in batch.status for batch in ours)
    assert 0 < without < len(ours), f"{without} of {len(ours)} batches had no mixed sample"
    return f"{said}; {without} of {len(ours)} batches had none"


@check("user-mix")
def users_own_mixes(setup: Setup) -> str:
    """A user's own pipeline with a stage that mixes."""
    reference, ours = three_epochs(
        setup, lambda tailed, where: users_own(tailed, where, "full", "number", **RARELY)
    )
    mixed = int(sum((batch.mu < 1).sum() for batch in ours))
    assert mixed, "no sample was mixed"
    return f"{compare(reference, ours)}, {mixed} mixed"


@check(*product("arrays", BUILT_IN, TENSORS))
def arrays_pipeline(setup: Setup, method: str, tensor: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tailed, pixels = in_memory(setup, folder)
        reference, ours = (
            list(train_batches(tailed, where, pixels, method, tensor))
            for where in (None, setup.device_id)
        )
        return compare(reference, ours) + (mixed(ours) if method == "scae" else "")


@check(*product("saliency-arrays", TENSORS))
def saliency_arrays(setup: Setup, tensor: str) -> str:
    """The pass as training makes it: images from memory, maps into the cache."""
    image = memory_image(tensor)
    with tempfile.TemporaryDirectory() as folder:
        tailed, pixels = in_memory(setup, folder)
        torch.manual_seed(SEED)
        model = make_network("cifar_resnet20", tailed.index.num_classes).train()
        with torch.no_grad():  # so that BatchNorm has something to normalise by
            for _ in range(3):
                model(torch.randn(BATCH, 3, SIDE, SIDE))
        found = []
        for epoch, device_id in ((1, None), (2, setup.device_id)):
            step(f"pass on {device_id}")
            device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
            seen: list[Batch] = []

            def loader_for(ids, device_id=device_id, seen=seen):
                data = Data(tailed.index, tailed.index, pixels, pixels)
                loaders = Loaders(data, image, sampling="shuffle", seed=SEED)
                for batch in loaders.saliency(image, execution(device_id), ids):
                    seen.append(batch)
                    yield replace(batch, images=batch.images.float())

            refresh_cache(model.to(device), tailed.cache, tailed.index, loader_for, epoch=epoch)
            found.append((seen, tailed.cache.read(np.arange(SAMPLES))[0] / 255))
        (reference, maps), (ours, other) = found
        return f"{compare(reference, ours)}; maps: {compare_maps(maps, other)}"


@check(*product("compile", ("default", "reduce-overhead")))
def compiled(setup: Setup, mode: str) -> str:
    """ResNet-32 trained as the recipe for CIFAR-100-LT does, its network compiled and not."""
    if setup.device_id is None:
        return "skipped: compiling takes minutes on a CPU"
    with tempfile.TemporaryDirectory() as folder:
        tailed, pixels = in_memory(setup, folder)
        loader = train_batches(tailed, setup.device_id, pixels, "scae", "fp32-NCHW")
        # Another shape would be compiled anew.
        full = [b for b in itertools.chain(loader, loader) if len(b.images) == BATCH]
        plain, ours = (losses(tailed, full, setup.device, how) for how in (None, mode))
    apart = (np.abs(np.subtract(plain, ours)) / np.maximum(plain, 1)).max()
    assert apart < LOSS_DIFFERENCE, f"losses differ by {apart:.1%}: {plain}, compiled {ours}"
    return f"{len(ours)} steps, loss {ours[0]:.3f} to {ours[-1]:.3f}, at most {apart:.1%} apart"


def losses(setup: Setup, batches: list[Batch], device: str, mode: str | None) -> list[float]:
    """The loss of every step of a training. mode: of torch.compile; None: it is not compiled."""
    torch.manual_seed(SEED)
    net = make_network("cifar_resnet32", setup.index.num_classes)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = net if mode is None else torch.compile(net, mode=mode)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, nesterov=True)
    criterion = Loss(LossConfig(), setup.index.class_counts, torch.device(device)).at(0)
    found = []
    for batch in batches:
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with autocast("bf16", torch.device(device)):
            logits = model(images)
        loss = criterion(logits, batch.labels, batch.partners, batch.mu)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        step(f"loss {found[-1]:.4f} after {len(found)} steps")
    return found


def harvest_of(net: torch.nn.Module, setup: Setup) -> Harvest:
    classes = setup.index.num_classes
    return Harvest(net, None, samples=SAMPLES, num_classes=classes, grid=(7, 7), size=SIDE)


@check("harvest/plain", "harvest/reduce-overhead")
def harvested(setup: Setup, how: str) -> str:
    """What training gathers of an epoch, with a compiled network too."""
    if setup.device_id is None and how != "plain":
        return "skipped: on the CPU there is nothing to compare with, and compiling takes minutes"
    with tempfile.TemporaryDirectory() as folder:
        tailed, pixels = in_memory(setup, folder)
        found = []
        for device_id in (None, setup.device_id):
            device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
            torch.manual_seed(SEED)
            net = make_network("cifar_resnet20", tailed.index.num_classes).to(device)
            harvest = harvest_of(net, tailed)
            compile_it = device_id is not None and how != "plain"
            model = torch.compile(net, mode=how) if compile_it else net
            for batch in train_batches(tailed, device_id, pixels, "scae", "fp32-NCHW"):
                logits = model(batch.images)
                harvest.add(batch)
                net.zero_grad(set_to_none=True)  # they lie where the next graph writes
                logits.sum().backward()  # without it CUDA graphs are recorded, and never replayed
            step(f"harvested on {device}")
            found.append(harvest.maps(harvest.seen()))
        (reference, counts), (ours, other) = found
        assert np.array_equal(counts, other), "other cells were seen"
        return f"{len(ours)} maps, {compare_maps(reference, ours)}"


@check(*product("unwaited", ("pass", "harvest", "ema")))
def unwaited(setup: Setup, what: str) -> str:
    """A batch of a pass, of a harvest or of an average of the weights never waits for the GPU."""
    if setup.device_id is None:
        return "skipped: only another device can be waited for"
    with tempfile.TemporaryDirectory() as folder:
        tailed, pixels = in_memory(setup, folder)
        batches = list(train_batches(tailed, setup.device_id, pixels, "scae", "fp32-NCHW"))
    net = make_network("cifar_resnet20", tailed.index.num_classes).to(setup.device)
    harvest, ema = harvest_of(net, tailed), EMA(net, 0.9)
    cam, labels = GradCAM(net), torch.from_numpy(tailed.index.labels.copy())
    torch.cuda.synchronize()
    with no_waiting():
        for batch in batches:
            if what == "pass":
                cam(batch.images, labels[batch.ids])
            elif what == "ema":
                ema.update_parameters(net)
            else:
                net(batch.images)
                harvest.add(batch)
                harvest.state_dict()  # put back now: so few crops would wait for more
    return f"{len(batches)} batches"
