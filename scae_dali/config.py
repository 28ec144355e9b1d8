"""The settings of every method as frozen, validated dataclasses. Nothing here computes."""

from dataclasses import dataclass
from typing import Literal

Range = tuple[float, float]
Fill = Literal["mean", "zero", "color", "noise"]
Border = Literal["inside", "clip"]
TailErase = Literal["class", "always"]
CropKind = Literal["resized", "pad"]

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


@dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """No augmentation beyond crop and flip: the baseline."""


@dataclass(frozen=True, kw_only=True)
class RectangleConfig:
    """The erased rectangle: how large, where it may lie, and what fills it.

    area: share of the crop, a ~ U[low, high]. aspect: r = h/w ~ U[low, high], uniform, not
    log-uniform. tries: redraws of (a, r) while the rectangle does not fit; then no erasing.
    fill: `mean` of the data set, `zero` (black), `color` (one uniform random colour an image) or
    `noise` (per pixel, normal, with the data set's mean and deviation).
    """

    area: Range = (0.02, 0.33)
    aspect: Range = (0.3, 3.3)
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
        check(1 <= self.tries <= 100, f"tries must be in [1, 100], got {self.tries}")
        check_choice("fill", self.fill, ("mean", "zero", "color", "noise"))


@dataclass(frozen=True, kw_only=True)
class RandomErasingConfig(RectangleConfig):
    """Random Erasing (Zhong et al., AAAI 2020), with the settings of the authors' code."""

    prob: float = 0.5
    area: Range = (0.02, 0.4)
    aspect: Range = (0.3, 3.33)
    tries: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prob("prob", self.prob)


@dataclass(frozen=True, kw_only=True)
class ScaeConfig(RectangleConfig):
    """SCAE: where from the saliency map (eq. 4), how often from the class's frequency (eq. 7).

    lam_max: λ at the last epoch (eq. 5); negative values protect the salient region.
    p_min, p_max, gamma: eq. 7; class_aware=False erases every class with p_max.
    border: `inside` draws the centre among those for which the rectangle fits; `clip` draws it
    anywhere and clips the rectangle.
    refresh_every: epochs between saliency passes; 0 means a cache built offline, never refreshed.

    Eq. 8, where class_aware: a class k is of the tail if f_k < tail. Its samples are mixed with
    probability mix_prob, with weight μ ~ Beta(mix_alpha, mix_alpha) and a partner of the same class
    or of one of its nearest `neighbors` classes, each class equally likely (0: the same class
    only). The others are erased, with p_k (tail_erase `class`) or all of them (`always`).
    tail_lambda: λ of tail classes at the last epoch, instead of lam_max.
    """

    lam_max: float = 2.0
    p_min: float = 0.1
    p_max: float = 0.5
    gamma: float = 0.5
    class_aware: bool = True
    border: Border = "inside"
    refresh_every: int = 10
    tail: float = 0.1
    mix_prob: float = 0.5
    mix_alpha: float = 0.4
    neighbors: int = 1
    tail_erase: TailErase = "class"
    tail_lambda: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lam_max", "tail_lambda"):
            value = getattr(self, name) or 0.0
            check(
                abs(value) <= 100,
                f"{name} must be in [-100, 100], got {value}; the paper's value is 2",
            )
        check_prob("p_min", self.p_min)
        check_prob("p_max", self.p_max)
        check(self.gamma >= 0, f"gamma must be >= 0, got {self.gamma}; the paper's value is 0.5")
        check_choice("border", self.border, ("inside", "clip"))
        check(self.refresh_every >= 0, f"refresh_every must be >= 0, got {self.refresh_every}")
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
class SaliencyMixConfig(CutmixConfig):
    """SaliencyMix (Uddin et al., ICLR 2021).

    preset: `paper` centres the box on the peak of the second image's map; `official` does what the
    authors' code does: one box for the whole batch (`per` is ignored), centred anywhere.
    refresh_every: epochs between saliency passes; 0 means a cache built offline, never refreshed.
    """

    prob: float = 0.5
    preset: Literal["paper", "official"] = "paper"
    refresh_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("preset", self.preset, ("paper", "official"))
        check(self.refresh_every >= 0, f"refresh_every must be >= 0, got {self.refresh_every}")


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
