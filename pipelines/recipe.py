"""A training run as a config: what train.py takes from the command line and from YAML."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torchvision
from torch import nn

from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data, DataConfig
from scae_dali.cache.cache import SaliencyCache
from scae_dali.checks import check, check_choice, check_seed
from scae_dali.methods import BUILT_IN, base, compose, load, make_config
from scae_dali.methods.loading import as_config
from scae_dali.plan.order import epoch_size
from scae_dali.stage.stage import Stage
from scae_dali.training import networks
from scae_dali.training.losses import LossConfig
from scae_dali.training.networks import MODELS
from scae_dali.training.second_stage import SecondStageConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum.

    Args:
        lr: Learning rate, for the batches of all processes together.
        momentum: Nesterov momentum.
        weight_decay: Weight decay (L2).
        decay_norms: Whether weight decay also acts on biases and on the weights of norm layers.
        schedule: `step` multiplies the learning rate by `factor` at each of the `milestones`.
            `cosine` lowers it to `lr_min` along a cosine.
        milestones: Epochs at which schedule=step lowers the learning rate.
        factor: What schedule=step multiplies the learning rate by.
        lr_min: Learning rate at the end of schedule=cosine.
        warmup_epochs: Epochs over which the learning rate first rises linearly to lr.
        ema: Decay, for each step, of an averaged copy of the weights, which is then the one
            validated and saved. 0 averages nothing.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms: bool = True
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = (30, 60, 90)
    factor: float = 0.1
    lr_min: float = 0.0
    warmup_epochs: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        check(0 < self.lr < math.inf, f"optim.lr must be positive and finite, got {self.lr}")
        check(0 < self.momentum < 1, f"optim.momentum must be in (0, 1), got {self.momentum}")
        for name in ("weight_decay", "factor", "lr_min", "warmup_epochs"):
            value = getattr(self, name)
            check(
                0 <= value < math.inf, f"optim.{name} must be at least 0, got {value}, and finite"
            )
        check_choice("optim.schedule", self.schedule, ("step", "cosine"))
        check(0 <= self.ema < 1, f"optim.ema must be in [0, 1), got {self.ema}; 0 switches it off")

    def optimizer(self, trained: Sequence[Mapping[str, Any]]) -> torch.optim.SGD:
        """SGD over groups of parameters, `{"params": […], "lr_factor": float}` each."""
        groups: list[dict[str, Any]] = []
        for group in trained:
            decayed = [p for p in group["params"] if self.decay_norms or p.ndim > 1]
            spared = [p for p in group["params"] if not self.decay_norms and p.ndim <= 1]
            for params, weight_decay in ((decayed, self.weight_decay), (spared, 0.0)):
                groups.append({**group, "params": params, "weight_decay": weight_decay})
        return torch.optim.SGD(groups, self.lr, self.momentum, nesterov=True)

    def lr_at(self, step: int, steps: int, epochs: int) -> float:
        """The learning rate at a step counted from the run's start, `steps` to the epoch."""
        epoch = step / steps
        if epoch < self.warmup_epochs:
            return self.lr * (step + 1) / (self.warmup_epochs * steps)
        if self.schedule == "step":
            return self.lr * self.factor ** sum(epoch >= m for m in self.milestones)
        done = (epoch - self.warmup_epochs) / (epochs - self.warmup_epochs)
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, kw_only=True)
class SaliencyConfig:
    """The saliency cache and what fills it.

    Args:
        source: `pass` makes the maps by Grad-CAM on whole images, in separate passes. `harvest`
            takes them from the forward passes of training; the network must end in a pooling and
            one linear layer. `both` makes passes over `share` of the images and harvests the rest.
        share: Share of the images that each pass sees, those with the oldest maps first.
        cache: LMDB cache of the maps. null puts saliency.lmdb into the run's folder, one for each
            node.
        layer: Name of the module whose output Grad-CAM looks at. null takes the usual one of the
            network's family.
        batch_size: Batch size of a pass in one process. null takes that of training, or a larger
            one on a GPU if the images are small.
        size: Side in pixels that a pass stretches whole images to. null takes image.size.
    """

    source: Literal["pass", "harvest", "both"] = "pass"
    share: float = 1.0
    cache: str | None = None
    layer: str | None = None
    batch_size: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        check_choice("saliency.source", self.source, ("pass", "harvest", "both"))
        check(
            0 < self.share <= 1,
            f"saliency.share must be in (0, 1], got {self.share}; 0.1 sees a tenth of the images "
            "in a pass",
        )
        for name in ("batch_size", "size"):
            value = getattr(self, name)
            check(
                value is None or value >= 1,
                f"saliency.{name} must be at least 1, got {value}; leave it out for the training's",
            )
        check(
            self.source != "both" or self.share < 1,
            "saliency.share must be below 1 where saliency.source is both, got 1: the pass would "
            "leave nothing to the harvest",
        )
        check(
            self.source != "harvest" or self.share == 1,
            f"saliency.share is that of a pass, and saliency.source harvest makes none, got "
            f"{self.share}; set the source to both",
        )


# The Configs of the built-in methods, by name; a method without settings has none here.
METHODS = {name: load(name).Config for name in BUILT_IN if dataclasses.fields(load(name).Config)}


def with_methods(cls: type) -> type:
    """Add a field for each of METHODS, behind `method`, to a class that becomes a dataclass.

    The field has the method's name. Its heading in --help is the first line of the docstring of the
    method's Config.
    """
    types: dict[str, Any] = {}
    for name, annotation in cls.__annotations__.items():
        types[name] = annotation
        if name == "method":
            types |= METHODS
    cls.__annotations__ = types
    cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n"
    for name, config in METHODS.items():
        setattr(cls, name, field(default_factory=config))
        title = (config.__doc__ or "").splitlines()[0].rstrip(".")
        cls.__doc__ += f"        {name}: --method {name}: {title}\n"
    return cls


@dataclass(frozen=True, kw_only=True)
@with_methods
class Config:
    """A training run.

    Behind `method` there is a field for every built-in method that has settings: see METHODS.

    Args:
        data: The images
        out: Folder of the run, for its checkpoint, metrics, weights and saliency cache. It must be
            new, or hold a run that is resumed.
        model: Name of a classification network of torchvision, or of one for 32 px: cifar_resnet20,
            cifar_resnet32, cifar_resnet44, cifar_resnet56 or cifar_resnet18.
        method: Augmentation, by its name (scae, random_erasing, …; none is crop and flip alone), or
            the dotted name of a module of your own. Several are joined by a plus sign, such as
            rand_augment+scae.
        method_args: Settings of a module of your own, as JSON. If several methods are joined, they
            stand under the module's name.
        image: How images become tensors
        optim: Optimiser (SGD) and schedule of the learning rate
        loss: Label smoothing and weights of the classes
        second_stage: Second stage, which trains the classifier again on the features of a first run
        sampling: `shuffle` shows every image once in an epoch. `class_balanced` shows every class
            equally often, as often as the largest class has images.
        saliency: Saliency maps, for methods that look at them
        epochs: Number of epochs, T in eq. 5.
        batch_size: Batch size of one process.
        threads: DALI's CPU threads in one process.
        hw_decoder_load: Share of a batch that the GPU's JPEG engine decodes, if the GPU has one.
        device: Where to train; `auto` takes a GPU if there is one.
        amp: Mixed precision, as the type that torch.autocast computes in.
        channels_last: Keep the network's weights and the images in channels-last memory format.
        compile: Mode of torch.compile. `reduce-overhead` captures CUDA graphs, which helps small
            networks.
        backend: DALI operator that runs the augmentation's Python code. The plan is the same.
        seed: Seed of everything random.
        checkpoint_every: Steps between two checkpoints within an epoch. 0 makes one at the end of
            an epoch only.
    """

    data: DataConfig
    out: str
    model: str = "resnet50"
    method: str = "scae"
    method_args: dict[str, Any] = field(default_factory=dict)
    image: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    second_stage: SecondStageConfig = field(default_factory=SecondStageConfig)
    sampling: Literal["shuffle", "class_balanced"] = "shuffle"
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    epochs: int = 100
    batch_size: int = 256
    threads: int = 4
    hw_decoder_load: float = ExecConfig.hw_decoder_load
    device: Literal["auto", "cuda", "cpu"] = "auto"
    amp: Literal["none", "bf16", "fp16"] = "none"
    channels_last: bool = False
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    backend: Literal["python", "torch", "numpy"] = "python"
    seed: int = 0
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}")
        check_seed(self.seed)
        if self.backend == "numpy":
            object.__setattr__(self, "backend", "python")
        check(
            self.optim.warmup_epochs < self.epochs,
            f"optim.warmup_epochs must be below epochs ({self.epochs}), got "
            f"{self.optim.warmup_epochs}",
        )
        check(
            self.loss.class_balanced == 0 or self.loss.defer < self.epochs,
            f"loss.defer must be below epochs ({self.epochs}), got {self.loss.defer}: the weights "
            "would never act",
        )
        guide = self.guide()
        check(
            guide is None or guide.refresh_every > 0 or bool(self.saliency.cache),
            "refresh_every=0 means a cache built offline, got saliency.cache=None: name it "
            "(tools/build_cache.py builds one), or refresh every so many epochs",
        )
        check(
            guide is None or self.saliency.source == "pass" or guide.refresh_every > 0,
            f"saliency.source={self.saliency.source} needs refresh_every > 0, got 0",
        )
        check(
            self.image.dtype == "fp32" or self.amp != "none",
            "image.dtype must be fp32 where amp is none, got fp16: give --amp bf16 or fp16",
        )
        check(
            self.checkpoint_every >= 0,
            f"checkpoint_every must be >= 0, got {self.checkpoint_every}",
        )

    def method_configs(self) -> dict[str, Any]:
        """The Config of every method in use, by its name."""
        names = compose.split(self.method)
        own = [name for name in names if name not in BUILT_IN]
        given = self.method_args
        if given and len(names) == 1 and own:
            given = {own[0]: given}
        check(
            set(given) <= set(own),
            f"method_args must be settings of modules of yours, got {self.method_args} for method "
            f"{self.method}; those of a built-in method go under its name, --scae.lam_max 2",
        )
        return {
            name: getattr(self, name)
            if name in METHODS
            else make_config(load(name), given.get(name, {}))
            for name in names
        }

    def guide(self) -> base.Config | None:
        """The Config of the method that looks at saliency maps or neighbouring classes, if one
        does."""
        configs = {name: as_config(one) for name, one in self.method_configs().items()}
        guides = {
            name: config
            for name, config in configs.items()
            if config.guided or config.wants_neighbors
        }
        passes = {name: config.refresh_every for name, config in guides.items()}
        check(
            len(set(passes.values())) < 2,
            f"refresh_every must be the same for methods that share the maps, got {passes}",
        )
        # One that wants neighbours alone must not hide one that wants maps.
        return max(guides.values(), key=lambda one: one.guided, default=None)

    def stage(self, data: Data, cache: SaliencyCache | None, *, num_shards: int) -> Stage:
        """The augmentation. num_shards: ranks."""
        return Stage(
            data.train,
            self.method,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            cache=cache,
            num_shards=num_shards,
            epoch_size=epoch_size(data.train.labels, self.sampling),
            mean=self.image.mean,
            std=self.image.std,
            backend=self.backend,
            **self.method_configs(),
        )

    def saliency_image(self) -> ImageConfig:
        """The images of the saliency pass."""
        size = self.saliency.size or self.image.size
        return dataclasses.replace(self.image, size=size, val_resize=size)


def make_network(name: str, classes: int) -> nn.Module:
    """A classification network with random weights, its logits the only output."""
    if name in MODELS:
        return networks.make(name, classes)
    known = torchvision.models.list_models(torchvision.models)
    close = difflib.get_close_matches(name, [*known, *MODELS])
    check(
        name in known,
        f"model must be a classification network of torchvision or one of {', '.join(MODELS)}, got "
        f"{name!r}; did you mean {' or '.join(close) or 'resnet50'}?",
    )
    more = {}
    if name in ("googlenet", "inception_v3"):
        more = {"aux_logits": False, "init_weights": True}
    return torchvision.models.get_model(name, num_classes=classes, **more)


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """The mixed precision of a run, for training and saliency pass alike."""
    if amp == "none":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp])
