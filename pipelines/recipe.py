"""The settings of a run, which train.py takes from the command line and from YAML, and what is made
from them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data, DataConfig
from scae_dali.cache import SaliencyCache
from scae_dali.checks import check, check_choice, check_seed, expand_home
from scae_dali.methods import BUILT_IN, base, compose, load, make_config, switch
from scae_dali.methods.loading import as_config
from scae_dali.plan.order import EpochLength, epoch_size
from scae_dali.stage.stage import Stage
from scae_dali.training.losses import LossConfig, logit_adjustment
from scae_dali.training.optim import OptimConfig
from scae_dali.training.second_stage import SecondStageConfig


@dataclass(frozen=True, kw_only=True)
class SaliencyConfig:
    """The saliency cache and what fills it.

    Args:
        source: `pass` makes the maps by Grad-CAM on whole images, in separate passes. `harvest`
            takes them from the forward passes of training; the network must end in a pooling and
            one linear layer. `both` makes passes over `share` of the images, and harvests the maps
            of the others.
        share: Share of the images, above 0 and at most 1, that each pass sees: those with the
            oldest maps first.
        cache: LMDB cache of the maps. null puts saliency.lmdb into the run's folder, one for each
            node.
        layer: Name of the module whose output Grad-CAM looks at. null takes the usual one of the
            network's family.
        batch_size: Batch size of a pass in one process. null takes that of training, or a larger
            one on a GPU if the images are small.
        size: Side in pixels of the square to which a pass resizes whole images. null takes
            image.size.
    """

    source: Literal["pass", "harvest", "both"] = "pass"
    share: float = 1.0
    cache: str | None = None
    layer: str | None = None
    batch_size: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        expand_home(self, "cache")
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
    """Decorator: add a field for each of METHODS, behind `method`, to a class before @dataclass.

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
            cifar_resnet32, cifar_resnet44, cifar_resnet56 or cifar_resnet18. timm:NAME takes a
            network of timm. package.module:function takes what your own function makes, which is
            called with num_classes.
        weights: File with a state_dict of the network, which training starts from and --evaluate
            validates. A checkpoint.pt of a run with optim.ema gives the average of the weights.
            null starts from random weights.
        method: Augmentation, by its name (scae, random_erasing, …; none is crop and flip alone), or
            the dotted name of a module of your own. Several are joined by a plus sign, such as
            rand_augment+scae. `mixup|cutmix` takes one of the two for each batch.
        switch_prob: Probability that a batch takes the second of two methods that are joined by |.
        method_args: Settings of a module of your own, as JSON. If several methods are joined, they
            stand under the module's name.
        image: How images become tensors
        optim: Optimiser and schedule of the learning rate
        loss: Logit adjustment, label smoothing and weights of the classes
        second_stage: Second stage, which trains the classifier again on the features of a first run
        sampling: `shuffle` shows every image once in an epoch. `class_balanced` shows every class
            equally often.
        epoch_length: Length of an epoch of class_balanced. `largest` shows as many images of every
            class as the largest class has. `dataset` shows as many images as the data set has.
        samples_per_turn: How many images of one class come in a row with class_balanced.
        saliency: Saliency maps, for methods that look at them
        epochs: Number of epochs, T in eq. 5.
        batch_size: Number of images in a batch of one process.
        accumulate: How many batches make up one step of the optimiser. The gradient is the mean of
            theirs. At the end of an epoch fewer are left, and are a step of their own. Learning
            rate and checkpoint_every count steps of the optimiser.
        threads: DALI's CPU threads in one process.
        hw_decoder_load: Share of a batch, from 0 to 1, that the GPU's JPEG engine decodes, if the
            GPU has one.
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
    weights: str | None = None
    method: str = "scae"
    switch_prob: float = switch.Config.switch_prob
    method_args: dict[str, Any] = field(default_factory=dict)
    image: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    second_stage: SecondStageConfig = field(default_factory=SecondStageConfig)
    sampling: Literal["shuffle", "class_balanced"] = "shuffle"
    epoch_length: EpochLength = "largest"
    samples_per_turn: int = 1
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    epochs: int = 100
    batch_size: int = 256
    accumulate: int = 1
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
        expand_home(self, "out", "weights")
        check(self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}")
        check(
            self.accumulate >= 1,
            f"accumulate must be at least 1 batch a step, got {self.accumulate}",
        )
        check(
            self.weights is None or not self.second_stage.classifier,
            f"weights are those that a first training starts from, got {self.weights!r} with "
            f"second_stage.classifier={self.second_stage.classifier}: a second stage starts from "
            "second_stage.weights",
        )
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
        check(
            self.loss.logit_adjust == 0 or self.sampling == "shuffle",
            f"loss.logit_adjust={self.loss.logit_adjust} is for classes that are shown unequally "
            f"often, and sampling={self.sampling} shows all equally often: leave one of them out",
        )
        check(
            self.samples_per_turn >= 1,
            f"samples_per_turn must be at least 1, got {self.samples_per_turn}; published are 1 "
            "and 4",
        )
        check(
            self.sampling == "class_balanced" or self.samples_per_turn == 1,
            f"samples_per_turn must be 1 with sampling={self.sampling}, got "
            f"{self.samples_per_turn}: only class_balanced takes the classes in turn",
        )
        guided = self.guided_config()
        check(
            guided is None or guided.refresh_every > 0 or bool(self.saliency.cache),
            "refresh_every=0 means a cache built offline, got saliency.cache=None: name it "
            "(`scae-dali build-cache` builds one), or refresh every so many epochs",
        )
        check(
            guided is None or self.saliency.source == "pass" or guided.refresh_every > 0,
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
        """The Config of every method in use, by its name; see compose.configs."""
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
        settings = {
            name: getattr(self, name)
            if name in METHODS
            else make_config(load(name), given.get(name, {}))
            for name in names
        }
        if compose.switched(self.method) or self.switch_prob != switch.Config.switch_prob:
            settings["switch_prob"] = self.switch_prob
        return compose.configs(self.method, settings)

    def guided_config(self) -> base.Config | None:
        """The Config of the method that looks at saliency maps or neighbouring classes; None if
        none does."""
        configs = {name: as_config(one) for name, one in self.method_configs().items()}
        guided = {
            name: config
            for name, config in configs.items()
            if config.guided or config.wants_neighbors
        }
        passes = {name: config.refresh_every for name, config in guided.items()}
        check(
            len(set(passes.values())) < 2,
            f"refresh_every must be the same for methods that share the maps, got {passes}",
        )
        # A method that wants neighbours alone must not hide one that wants maps, nor one without λ
        # one that has it.
        return max(guided.values(), key=lambda one: (one.guided, abs(one.lam_max)), default=None)

    def neighbors(self, class_counts: np.ndarray) -> int:
        """How many neighbouring classes of each class the method asks for; 0: none.

        class_counts: int64 [K], of the training set.
        """
        config = self.guided_config()
        return 0 if config is None else config.neighbors_for(class_counts)

    def post_hoc(self, class_counts: np.ndarray) -> np.ndarray | None:
        """What post-hoc logit adjustment subtracts from the logits: log π, less the part of it that
        training has added already. None where all classes have the same size or are balanced by
        other means.

        class_counts: int64 [K], of the training set. Returns float64 [K].
        """
        balanced = self.sampling != "shuffle" or self.loss.class_balanced > 0
        if balanced or len(set(class_counts.tolist())) == 1:
            return None
        return logit_adjustment(class_counts, 1 - self.loss.logit_adjust)

    def epoch_size(self, labels: np.ndarray) -> int:
        """How many images an epoch has, in all processes together. labels: int64 [N], of the
        training set."""
        return epoch_size(labels, self.sampling, self.epoch_length)

    def stage(self, data: Data, cache: SaliencyCache | None, *, num_shards: int) -> Stage:
        """The augmentation as a stage. num_shards: number of ranks."""
        return Stage(
            data.train,
            self.method,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            cache=cache,
            num_shards=num_shards,
            epoch_size=self.epoch_size(data.train.labels),
            mean=self.image.mean,
            std=self.image.std,
            backend=self.backend,
            **self.method_configs(),
        )

    def saliency_image(self) -> ImageConfig:
        """The images of the saliency pass."""
        size = self.saliency.size or self.image.size
        return dataclasses.replace(self.image, size=size, val_resize=size)
