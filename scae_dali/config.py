"""The settings of every method as frozen, validated dataclasses. Nothing here computes."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Range = tuple[float, float]
Fill = Literal["mean", "zero", "color", "noise"]
Border = Literal["inside", "clip"]
TailErase = Literal["class", "always"]
AspectLaw = Literal["uniform", "log"]
ErasingPreset = Literal["official", "torchvision", "timm"]
CropKind = Literal["resized", "pad"]
LearnedPolicy = Literal["image_net", "reduced_image_net", "reduced_cifar10", "svhn"]

# Of ImageNet, in grey levels [0, 255], RGB.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_prob(name: str, value: float) -> None:
    check(0 <= value <= 1, f"{name} must be a probability in [0, 1], got {value}")


def check_fill(value: str) -> None:
    check_choice("fill", value, get_args(Fill))


@dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """No augmentation beyond crop and flip: the baseline."""


@dataclass(frozen=True, kw_only=True)
class RectangleConfig:
    """The erased rectangle: how large, where it may lie, and what fills it.

    area: share of the crop, a ~ U[low, high]. aspect: r = h/w in [low, high]; aspect_law: uniform
    or log-uniform (`log`). tries: draws of (a, r) until the rectangle fits; then no erasing.
    fill: `mean` of the data set, `zero` (black), `color` (one uniform random colour an image) or
    `noise` (per pixel, normal, with the data set's mean and deviation).
    """

    area: Range = (0.02, 0.33)
    aspect: Range = (0.3, 3.3)
    aspect_law: AspectLaw = "uniform"
    tries: int = 10
    fill: Fill = "mean"

    def __post_init__(self) -> None:
        low, high = self.area
        check(
            0 < low <= high < 1,
            f"area must be 0 < low <= high < 1, got {self.area}; the paper's range is (0.02, 0.33)",
        )
        low, high = self.aspect
        check(
            0 < low <= high,
            f"aspect must be 0 < low <= high, got {self.aspect}; the paper's range is (0.3, 3.3)",
        )
        check_choice("aspect_law", self.aspect_law, get_args(AspectLaw))
        check(1 <= self.tries <= 100, f"tries must be in [1, 100], got {self.tries}")
        check_fill(self.fill)


# What implementations of Random Erasing have instead of the authors' settings. timm's noise is its
# mode `pixel`; torchvision's value 0 comes after the normalisation, so it is the mean.
ERASING_PRESETS: dict[str, dict[str, Any]] = {
    "torchvision": {
        "area": (0.02, 0.33),
        "aspect": (0.3, 3.3),
        "aspect_law": "log",
        "tries": 10,
        "fill": "mean",
    },
    "timm": {
        "area": (0.02, 1 / 3),
        "aspect": (0.3, 1 / 0.3),
        "aspect_law": "log",
        "tries": 10,
        "fill": "noise",
    },
}


@dataclass(frozen=True, kw_only=True)
class RandomErasingConfig(RectangleConfig):
    """Random Erasing (Zhong et al., AAAI 2020), with the settings of the authors' code.

    preset: `torchvision` and `timm` set area, aspect, aspect_law, tries and fill, all of them, to
    those of that implementation (ERASING_PRESETS); to change one, set them without a preset.
    """

    prob: float = 0.5
    area: Range = (0.02, 0.4)
    aspect: Range = (0.3, 3.33)
    tries: int = 100
    preset: ErasingPreset = "official"

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, get_args(ErasingPreset))
        preset = ERASING_PRESETS.get(self.preset, {})
        given = {name: getattr(self, name) for name in preset}
        default = {f.name: f.default for f in fields(self) if f.name in preset}
        # A command line passes the defaults on; what was made with the preset has its values.
        if given not in (default, preset):
            other = ", ".join(f"{k}={v}" for k, v in given.items() if v != preset[k])
            raise ValueError(
                f"preset={self.preset} sets {', '.join(preset)}, got {other} too; leave them to "
                "the preset, or set all of them without one"
            )
        for name, value in preset.items():
            object.__setattr__(self, name, value)
        super().__post_init__()
        check_prob("prob", self.prob)


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """Of a method that looks at saliency maps.

    refresh_every: epochs between saliency passes; 0 means a cache built offline, never refreshed.
    """

    refresh_every: int = 10

    def __post_init__(self) -> None:
        check(self.refresh_every >= 0, f"refresh_every must be >= 0, got {self.refresh_every}")

    @property
    def guided(self) -> bool:
        """Whether maps are looked at with these settings."""
        return True


@dataclass(frozen=True, kw_only=True)
class ClassAdaptiveConfig(GuidedConfig):
    """Guided by the saliency map (eq. 4), as often as the class is frequent (eq. 7).

    lam_max: λ once all epochs are over (eq. 5); negative values protect the salient region.
    p_min, p_max, gamma: eq. 7; class_aware=False erases every class with p_max.

    Eq. 8, where class_aware: a class k is of the tail if f_k < tail. Its samples are mixed with
    probability mix_prob, with weight μ ~ Beta(mix_alpha, mix_alpha) and a partner of the same class
    or of one of its nearest `neighbors` classes, each class equally likely (0: the same class
    only). The others are erased, with p_k (tail_erase `class`) or all of them (`always`).
    tail_lambda: of tail classes, instead of lam_max.
    """

    lam_max: float = 2.0
    p_min: float = 0.1
    p_max: float = 0.5
    gamma: float = 0.5
    class_aware: bool = True
    tail: float = 0.1
    mix_prob: float = 0.5
    mix_alpha: float = 0.4
    neighbors: int = 1
    tail_erase: TailErase = "class"
    tail_lambda: float | None = None

    def __post_init__(self) -> None:
        GuidedConfig.__post_init__(self)
        for name in ("lam_max", "tail_lambda"):
            value = getattr(self, name) or 0.0
            check(
                abs(value) <= 100,
                f"{name} must be in [-100, 100], got {value}; the paper's value is 2",
            )
        check_prob("p_min", self.p_min)
        check_prob("p_max", self.p_max)
        check(self.gamma >= 0, f"gamma must be >= 0, got {self.gamma}; the paper's value is 0.5")
        check(0 <= self.tail <= 1, f"tail must be in [0, 1], got {self.tail}; the paper's is 0.1")
        check_prob("mix_prob", self.mix_prob)
        check(
            0 < self.mix_alpha <= 100,
            f"mix_alpha must be in (0, 100], got {self.mix_alpha}; the paper's value is 0.4",
        )
        check(self.neighbors >= 0, f"neighbors must be >= 0, got {self.neighbors}")
        check_choice("tail_erase", self.tail_erase, ("class", "always"))

    @property
    def lam_bound(self) -> float:
        """The largest |λ| that any class reaches."""
        return max(abs(self.lam_max), abs(self.tail_lambda or 0.0))

    @property
    def guided(self) -> bool:
        return self.lam_bound > 0

    @property
    def wants_neighbors(self) -> bool:
        """Whether neighbouring classes are asked for, found by the network at every pass."""
        return bool(self.mix_prob and self.neighbors and self.refresh_every)


@dataclass(frozen=True, kw_only=True)
class ScaeConfig(ClassAdaptiveConfig, RectangleConfig):
    """SCAE: where from the saliency map (eq. 4), how often from the class's frequency (eq. 7).

    The fields of ClassAdaptiveConfig and of RectangleConfig, and
    border: `inside` draws the centre among those for which the rectangle fits; `clip` draws it
    anywhere and clips the rectangle.
    """

    border: Border = "inside"

    def __post_init__(self) -> None:
        RectangleConfig.__post_init__(self)
        ClassAdaptiveConfig.__post_init__(self)
        check_choice("border", self.border, get_args(Border))


@dataclass(frozen=True, kw_only=True)
class CutoutConfig:
    """Cutout (DeVries and Taylor, 2017): with probability `prob`, a square of `length` pixels.

    The authors have 8 pixels for CIFAR-100 and 16 for CIFAR-10. fill: see RectangleConfig.
    """

    prob: float = 1.0
    length: int = 8
    fill: Fill = "mean"

    def __post_init__(self) -> None:
        check_prob("prob", self.prob)
        check(
            self.length >= 2 and self.length % 2 == 0,
            "length must be a positive even number of pixels, half on each side of the centre, got "
            f"{self.length}; the authors' is 8 for CIFAR-100 and 16 for CIFAR-10",
        )
        check_fill(self.fill)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """A grid of squares that are erased: one in every cell of d x d pixels, d in [d_min, d_max).

    ratio: of a cell's side, what is kept between two squares, rounded up to pixels; about
    (1 - ratio)² of the image is erased. rotate: the grid is turned by whole degrees in
    [0, rotate); 0 leaves it upright. fill: see RectangleConfig.
    """

    d_min: int = 96
    d_max: int = 224
    ratio: float = 0.6
    rotate: int = 360
    fill: Fill = "mean"

    def __post_init__(self) -> None:
        check(
            1 <= self.d_min < self.d_max,
            f"d_min and d_max must be 1 <= d_min < d_max, got {self.d_min} and {self.d_max}; the "
            "authors' are 96 and 224 for ImageNet, 24 and 32 for CIFAR-10",
        )
        check(
            0 < self.ratio < 1,
            f"ratio must be in (0, 1), got {self.ratio}; the authors' is 0.6 for ImageNet and 0.4 "
            "for CIFAR-10",
        )
        check(
            0 <= self.rotate <= 360,
            f"rotate must be in [0, 360] degrees, got {self.rotate}; 0 leaves the grid upright",
        )
        check_fill(self.fill)


@dataclass(frozen=True, kw_only=True)
class GridMaskConfig(GridConfig):
    """GridMask (Chen et al., 2020), with the authors' grid for ImageNet.

    prob: of erasing, reached after ramp_epochs: prob · min(1, epoch / ramp_epochs); 0: at once.
    The authors have, of d, ratio, rotate, prob and ramp_epochs: ImageNet 96 … 224, 0.6, 360, 0.8,
    240 of 300 epochs; CIFAR-10 24 … 32, 0.4, 0, 0.8.
    """

    prob: float = 0.8
    ramp_epochs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prob("prob", self.prob)
        check(
            self.ramp_epochs >= 0,
            f"ramp_epochs must be >= 0, got {self.ramp_epochs}; 0 is no ramp, the authors' is 240 "
            "of 300 epochs",
        )


@dataclass(frozen=True, kw_only=True)
class SemanticGridMaskConfig(ClassAdaptiveConfig, GridConfig):
    """SCAE with a grid instead of a rectangle: the fields of ClassAdaptiveConfig and GridConfig."""

    def __post_init__(self) -> None:
        GridConfig.__post_init__(self)
        ClassAdaptiveConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class BatchMixConfig:
    """Mixing within the batch: with probability `prob`, weight μ ~ Beta(alpha, alpha).

    per: both are drawn for each `sample`, or once for the whole `batch`, as in the authors' code.
    """

    prob: float = 1.0
    alpha: float = 1.0
    per: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        check_prob("prob", self.prob)
        check(
            0 < self.alpha <= 100,
            f"alpha must be in (0, 100], got {self.alpha}; published ones are 1, and for MixUp on "
            "ImageNet 0.2",
        )
        check_choice("per", self.per, ("sample", "batch"))


@dataclass(frozen=True, kw_only=True)
class MixupConfig(BatchMixConfig):
    """MixUp (Zhang et al., ICLR 2018). Published alphas: 1 for CIFAR, 0.2 for ImageNet."""


@dataclass(frozen=True, kw_only=True)
class CutmixConfig(BatchMixConfig):
    """CutMix (Yun et al., ICCV 2019). Published probabilities: 0.5 for PyramidNet on CIFAR, 1 for
    ResNets."""


@dataclass(frozen=True, kw_only=True)
class SaliencyMixConfig(CutmixConfig, GuidedConfig):
    """SaliencyMix (Uddin et al., ICLR 2021).

    preset: `paper` centres the box on the peak of the second image's map; `official` does what the
    authors' code does: one box for the whole batch (`per` is ignored), centred anywhere.
    """

    prob: float = 0.5
    preset: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        CutmixConfig.__post_init__(self)
        GuidedConfig.__post_init__(self)
        check_choice("preset", self.preset, ("paper", "official"))

    @property
    def guided(self) -> bool:
        return self.preset == "paper"


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What the policies share: translations, and what comes in from outside the image.

    max_translate_rel: the largest translation, as a share of the crop; None: so many pixels for
    crops of any size: 100 for RandAugment, 32 for TrivialAugment, 250 for AutoAugment.
    fill_value: grey level of what translation, shear and rotation leave empty.
    """

    max_translate_rel: float | None = 100 / 224
    fill_value: int = 128

    def __post_init__(self) -> None:
        largest = self.max_translate_rel
        check(
            largest is None or 0 <= largest <= 1,
            f"max_translate_rel must be in [0, 1] or None, got {largest}; 100/224 is usual",
        )
        check(
            0 <= self.fill_value <= 255,
            f"fill_value must be a grey level in [0, 255], got {self.fill_value}",
        )


@dataclass(frozen=True, kw_only=True)
class RandAugmentConfig(PolicyConfig):
    """RandAugment (Cubuk et al., NeurIPS 2020): n operations, of magnitude m of 0 … bins - 1."""

    n: int = 2
    m: int = 9
    bins: int = 31

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.n <= 16, f"n must be in [1, 16] operations, got {self.n}; usual is 2")
        check(
            0 <= self.m < self.bins,
            f"m must be in [0, {self.bins}), a magnitude of as many bins, got {self.m}; usual is 9",
        )


@dataclass(frozen=True, kw_only=True)
class TrivialAugmentConfig(PolicyConfig):
    """TrivialAugmentWide (Müller and Hutter, ICCV 2021): one operation of `bins` magnitudes.

    The paper translates by up to 32 pixels on CIFAR and on ImageNet.
    """

    bins: int = 31
    max_translate_rel: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.bins >= 1, f"bins must be at least 1, got {self.bins}; usual is 31")


@dataclass(frozen=True, kw_only=True)
class AutoAugmentConfig(PolicyConfig):
    """AutoAugment (Cubuk et al., CVPR 2019). policy: on which data set it was learned.

    The paper translates by up to 150 of 331 pixels.
    """

    policy: LearnedPolicy = "image_net"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("policy", self.policy, get_args(LearnedPolicy))


@dataclass(frozen=True, kw_only=True)
class KeepAugmentConfig(GuidedConfig, RectangleConfig, RandAugmentConfig):
    """KeepAugment (Gong et al., CVPR 2021); there is no code of the authors.

    mode: `cut` erases a rectangle that is not important; `paste` is RandAugment that puts an
    important rectangle back, and takes no note of `fill`. prob: of erasing, or of putting back.
    tau: a rectangle is important when its mean saliency is above this quantile of that of
    `candidates` random ones of its size.
    """

    mode: Literal["cut", "paste"] = "cut"
    prob: float = 1.0
    tau: float = 0.6
    candidates: int = 16

    def __post_init__(self) -> None:
        GuidedConfig.__post_init__(self)
        RectangleConfig.__post_init__(self)
        RandAugmentConfig.__post_init__(self)
        check_choice("mode", self.mode, ("cut", "paste"))
        check_prob("prob", self.prob)
        check(0 <= self.tau <= 1, f"tau must be a quantile in [0, 1], got {self.tau}; usual is 0.6")
        check(
            2 <= self.candidates <= 256,
            f"candidates must be in [2, 256], got {self.candidates}; the default is 16",
        )


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Random crop and flip.

    kind: `resized`, a window of `area` (share of the image) and `aspect` (w/h, log-uniform); or
    `pad`, one of the image's own size, shifted by up to `pad` pixels, black outside the image.
    flip: probability of a horizontal flip.
    """

    kind: CropKind = "resized"
    area: Range = (0.08, 1.0)
    aspect: Range = (3 / 4, 4 / 3)
    tries: int = 10
    pad: int = 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_choice("crop.kind", self.kind, ("resized", "pad"))
        check(self.pad >= 0, f"crop.pad must be >= 0 pixels, got {self.pad}")
        low, high = self.area
        check(0 < low <= high <= 1, f"crop.area must be 0 < low <= high <= 1, got {self.area}")
        low, high = self.aspect
        check(0 < low <= high, f"crop.aspect must be 0 < low <= high, got {self.aspect}")
        check(1 <= self.tries <= 100, f"crop.tries must be in [1, 100], got {self.tries}")
        check_prob("crop.flip", self.flip)
