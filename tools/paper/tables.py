"""The tables as data: what is trained for each cell, and the published figures.

Tables 1 to 4 are those of SCAE's paper, and `lt` is ours. Figures are percent. Those of the paper
stand here as far as they are known. `independent` figures are of other sources: one value or their
range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["TABLES", "Cell", "Section", "Table", "folder"]

Published = Mapping[str, float | tuple[float, ...]]  # cell -> figures


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row of the printed table: a method and its settings.

    name: in folders and in --methods; letters, digits, underscores. overrides: `option=value` of
    train.py. recipes: YAML files that are applied after the section's. first: the cell whose
    weights this one, a second stage, starts from. rank: cells of a smaller rank are trained before
    those of a larger, with all seeds. paper: column (`last`, which is top-1, or `top-5`) -> figure.
    independent: network -> top-1.
    """

    name: str
    title: str
    method: str
    overrides: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    first: str | None = None
    rank: int = 0
    paper: Mapping[str, float] = field(default_factory=dict)
    independent: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cells with the same data and recipe; gains are over the cell named `none`.

    contrasts: pairs of cells of which the report has the difference, the first less the second.
    """

    name: str
    title: str
    recipe: str
    cells: tuple[Cell, ...]
    overrides: tuple[str, ...] = ()
    contrasts: tuple[tuple[str, str], ...] = ()

    def cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table. models: the networks that the published figures are of; they are trained by
    default. epochs: those of the published figures."""

    title: str
    models: tuple[str, ...]
    epochs: int
    sections: tuple[Section, ...]
    note: str


def folder(table: str) -> str:
    """The name of a table's folder: table3, table_lt."""
    return f"table{table}" if table.isdigit() else f"table_{table}"


NONE = Cell(name="none", title="none", method="none")
SCAE = Cell(name="scae", title="SCAE", method="scae")
KEEP_AUGMENT = Cell(name="keep_augment", title="KeepAugment", method="keep_augment")
SALIENCY_MIX = Cell(name="saliency_mix", title="SaliencyMix", method="saliency_mix")


def _cell(title: str, name: str, *overrides: str, method: str = "") -> Cell:
    """A cell. overrides: `setting=value`, settings of its method."""
    method = method or name
    own = tuple(f"{method}.{override}" for override in overrides)
    return Cell(name=name, title=title, method=method, overrides=own)


RANDOM_ERASING = _cell("Random Erasing, p = 0.5", "random_erasing", "prob=0.5")
# SCAE's p, averaged over the samples of CIFAR-100-LT, rounds to 0.37 for both imbalances.
RANDOM_ERASING_P37 = _cell(
    "Random Erasing, p = 0.37", "random_erasing_p37", "prob=0.37", method="random_erasing"
)
CUTMIX = _cell("CutMix", "cutmix", "prob=1.0", "alpha=1.0")

# The authors' grids for 32 px and for 224 px. GridMask's probability grows for 80 % of the run; the
# semantic grids are as frequent as SCAE's rectangles.
GRID_32 = ("d_min=24", "d_max=32", "rotate=0", "ratio=0.4")
GRID_224 = ("d_min=96", "d_max=224", "rotate=360", "ratio=0.6")
GRID_MASK_32 = _cell("GridMask", "grid_mask", *GRID_32, "prob=0.8", "ramp_epochs=160")
MIXUP_32 = _cell("MixUp", "mixup", "alpha=1.0")
PER_IMAGE = (
    "MixUp and CutMix draw for every image, their authors' code once a batch (MiSLAS too). Random "
    "Erasing fills with the mean, as SCAE does, its authors' code with a lighter grey."
)

CIFAR = (
    NONE,
    RANDOM_ERASING,
    _cell("Cutout", "cutout", "length=8"),
    GRID_MASK_32,
    _cell("GridMask, semantic", "semantic_grid_mask", *GRID_32),
    MIXUP_32,
    CUTMIX,
    SALIENCY_MIX,
    KEEP_AUGMENT,
    SCAE,
)
IMAGENET = (
    NONE,
    RANDOM_ERASING,
    _cell("Cutout", "cutout", "length=112"),
    _cell("GridMask", "grid_mask", *GRID_224, "prob=0.8", "ramp_epochs=80"),
    _cell("GridMask, semantic", "semantic_grid_mask", *GRID_224),
    _cell("MixUp", "mixup", "alpha=0.2"),
    CUTMIX,
    SALIENCY_MIX,
    KEEP_AUGMENT,
    SCAE,
)


def _beside(
    cells: tuple[Cell, ...], paper: Published, independent: Mapping[str, Published] | None = None
) -> tuple[Cell, ...]:
    """The cells with published figures. independent: network -> cell -> figures."""
    found = []
    for cell in cells:
        others = {
            model: _values(figures[cell.name])
            for model, figures in (independent or {}).items()
            if cell.name in figures
        }
        own = dict(zip(("last", "top-5"), _values(paper.get(cell.name, ())), strict=False))
        found.append(dataclasses.replace(cell, paper=own, independent=others))
    return tuple(found)


def _values(figure: float | tuple[float, ...]) -> tuple[float, ...]:
    return figure if isinstance(figure, tuple) else (figure,)


CIFAR_PAPER: Published = {"none": 78.43}
CIFAR_INDEPENDENT: dict[str, Published] = {
    "cifar_resnet32": {"none": (70.2, 71.5), "random_erasing": 72.8},
    "cifar_resnet18": {"none": 76.4},
}
LONG_TAIL_PAPER: dict[int, Published] = {
    100: {
        "none": 38.32,
        "random_erasing": 39.14,
        "grid_mask": 39.53,
        "cutmix": 40.28,
        "mislas": 41.15,
        "guided": 40.87,
        "scae": 43.26,
    },
    50: {
        "none": 43.87,
        "random_erasing": 44.61,
        "grid_mask": 45.02,
        "cutmix": 45.79,
        "mislas": 47.02,
        "guided": 46.38,
        "scae": 48.91,
    },
}
LONG_TAIL_INDEPENDENT: dict[int, Published] = {
    100: {
        "none": (37.7, 38.3),
        "ldam_baseline": 38.3,
        "mixup": 39.5,
        "mislas_stage1": 39.5,
        "mislas": 47.0,
    },
    50: {"none": 43.8, "mixup": 45.4, "mislas_stage1": 45.4, "mislas": 52.3},
}
MISLAS_50 = ("loss.smoothing_head=0.3", "loss.smoothing_tail=0", "second_stage.classifier_lr=0.1")
LDAM_BASELINE = Cell(
    name="ldam_baseline",
    title="none, as LDAM-DRW trains it",
    method="none",
    recipes=("ldam_baseline",),
)
MISLAS_STAGE1 = Cell(
    name="mislas_stage1", title="MiSLAS, first stage", method="mixup", recipes=("mislas_stage1",)
)
SCAE_MIXUP = Cell(
    name="scae_mixup",
    title="SCAE + MixUp, first stage",
    method="scae+mixup",
    overrides=("scae.mix_prob=0",),
    recipes=("mislas_stage1",),
)
GUIDED = _cell("SCAE, not class-aware", "guided", "class_aware=false", method="scae")


def _mislas(title: str, name: str, first: str, imbalance: int) -> Cell:
    """MiSLAS' second stage."""
    return Cell(
        name=name,
        title=title,
        method="none",
        overrides=MISLAS_50 if imbalance == 50 else (),  # the recipe has the settings for 100
        recipes=("mislas_stage2",),
        first=first,
    )


def _long_tail(imbalance: int) -> Section:
    cells = (
        NONE,
        LDAM_BASELINE,
        RANDOM_ERASING,
        RANDOM_ERASING_P37,
        GRID_MASK_32,
        MIXUP_32,
        CUTMIX,
        MISLAS_STAGE1,
        _mislas("MiSLAS, second stage", "mislas", "mislas_stage1", imbalance),
        _mislas("none, MiSLAS' second stage", "none_mislas", "none", imbalance),
        GUIDED,
        SCAE,
        _mislas("SCAE, MiSLAS' second stage", "scae_mislas", "scae", imbalance),
        SCAE_MIXUP,
        _mislas("SCAE + MixUp, MiSLAS' second stage", "scae_mixup_mislas", "scae_mixup", imbalance),
    )
    return Section(
        name=f"rho{imbalance}",
        title=f"CIFAR-100-LT, imbalance {imbalance}",
        recipe="cifar100_lt",
        overrides=(f"data.imbalance={imbalance}",),
        cells=_beside(
            cells,
            LONG_TAIL_PAPER[imbalance],
            {"cifar_resnet32": LONG_TAIL_INDEPENDENT[imbalance]},
        ),
        contrasts=(("scae_mislas", "none_mislas"), ("scae_mixup_mislas", "mislas")),
    )


def _scae(title: str, name: str, *overrides: str) -> Cell:
    return _cell(title, name, *overrides, method="scae")


UNGUIDED = _scae("SCAE without guidance", "unguided", "lam_max=0")

# One factor off at a time: guidance (lam_max), p by class (gamma), mixing of the tail (mix_prob).
ABLATION_BALANCED = (
    NONE,
    RANDOM_ERASING,
    RANDOM_ERASING_P37,
    _scae("SCAE's rectangle, no guidance", "uniform", "lam_max=0"),
    _scae("SCAE, p = 0.372", "scae_p37", "class_aware=false", "p_max=0.372"),
    SCAE,
)
ABLATION_LONG_TAIL = (
    NONE,
    RANDOM_ERASING,
    RANDOM_ERASING_P37,
    _scae("SCAE's rectangle, p = 0.5", "uniform", "class_aware=false", "lam_max=0"),
    _scae(
        "SCAE's rectangle, p = 0.372",
        "uniform_p37",
        "class_aware=false",
        "lam_max=0",
        "p_max=0.372",
    ),
    _scae("p by class alone", "class_alone", "lam_max=0", "mix_prob=0"),
    _scae("+ guidance", "guided", "class_aware=false"),
    _scae("+ guidance, p = 0.372", "guided_p37", "class_aware=false", "p_max=0.372"),
    _scae("+ guidance, p by class", "guided_class", "mix_prob=0"),
    UNGUIDED,
    _scae("SCAE without p by class", "classless", "gamma=0"),
    SCAE,
    _scae("SCAE, rectangle up to 0.2", "area_20", "area=[0.02,0.2]"),
    _scae("SCAE, λ up to 4", "lam_4", "lam_max=4"),
    _scae("SCAE, λ up to 8", "lam_8", "lam_max=8"),
    _scae("SCAE, tail protected (λ down to -2)", "tail_protected", "tail_lambda=-2"),
)


def _strong(title: str, name: str, *overrides: str, method: str = "") -> Cell:
    """AutoAugment as in strong.yaml, then another method. overrides: `option=value`."""
    return Cell(
        name=f"auto_augment_{name}",
        title=f"AutoAugment + {title}",
        method=f"auto_augment+{method or name}",
        overrides=overrides,
        recipes=("strong",),
    )


# The cells of each loss, each behind its rank.
GRID = (
    (0, NONE),
    (1, RANDOM_ERASING_P37),
    (1, SCAE),
    (1, UNGUIDED),
    (1, _cell("CMO", "cmo")),
    (
        1,
        Cell(
            name="scae_cmo", title="SCAE + CMO", method="scae+cmo", overrides=("scae.mix_prob=0",)
        ),
    ),
    (1, _cell("saliency-CMO", "saliency_cmo", "saliency=true", method="cmo")),
    (0, _strong("Cutout", "cutout")),
    (0, _strong("Random Erasing, p = 0.37", "random_erasing", "random_erasing.prob=0.37")),
    (0, _strong("SCAE", "scae")),
    (2, _strong("SCAE without guidance", "unguided", "scae.lam_max=0", method="scae")),
)
CONTRASTS = (
    ("scae", "unguided"),
    ("scae", "random_erasing_p37"),
    ("auto_augment_scae", "auto_augment_unguided"),
    ("auto_augment_scae", "auto_augment_random_erasing"),
    ("auto_augment_scae", "auto_augment_cutout"),
    ("scae_cmo", "cmo"),
    ("saliency_cmo", "cmo"),
)


def _grid(imbalance: int, rank: int) -> tuple[Section, Section]:
    """The losses on one data set: Balanced Softmax from this rank on, then cross-entropy, then
    MiSLAS and the baseline of LDAM-DRW."""
    others = (
        LDAM_BASELINE,
        MISLAS_STAGE1,
        _mislas("MiSLAS", "mislas", "mislas_stage1", imbalance),
        SCAE_MIXUP,
        _mislas("MiSLAS with SCAE", "scae_mixup_mislas", "scae_mixup", imbalance),
    )

    def cells(rank: int) -> tuple[Cell, ...]:
        return tuple(dataclasses.replace(cell, rank=rank + own) for own, cell in GRID)

    own = (f"data.imbalance={imbalance}",)
    last = tuple(dataclasses.replace(cell, rank=rank + 6) for cell in others)
    balanced = Section(
        name=f"rho{imbalance}_bs",
        title=f"CIFAR-100-LT, imbalance {imbalance}, Balanced Softmax",
        recipe="cifar100_lt",
        overrides=(*own, "loss.logit_adjust=1"),
        cells=cells(rank),
        contrasts=CONTRASTS,
    )
    plain = Section(
        name=f"rho{imbalance}_ce",
        title=f"CIFAR-100-LT, imbalance {imbalance}, cross-entropy and MiSLAS",
        recipe="cifar100_lt",
        overrides=(*own, "loss.logit_adjust=0"),
        cells=_beside(
            (*cells(rank + 3), *last),
            LONG_TAIL_PAPER[imbalance],
            {"cifar_resnet32": LONG_TAIL_INDEPENDENT[imbalance]},
        ),
        contrasts=(*CONTRASTS, ("scae_mixup_mislas", "mislas")),
    )
    return balanced, plain


TABLES = {
    "1": Table(
        title="CIFAR-100",
        models=("cifar_resnet32", "cifar_resnet18"),
        epochs=200,
        sections=(
            Section(
                name="cifar100",
                title="CIFAR-100",
                recipe="cifar100",
                cells=_beside(CIFAR, CIFAR_PAPER, CIFAR_INDEPENDENT),
            ),
        ),
        note=f"{PER_IMAGE} The paper's baseline fits a ResNet-18-class network rather than a "
        "ResNet-32, so its figure stands beside both. Every class has as many images: SCAE erases "
        "all of them with p_max and mixes none.",
    ),
    "2": Table(
        title="ImageNet",
        models=("resnet50",),
        epochs=100,
        sections=(
            Section(
                name="imagenet",
                title="ImageNet",
                recipe="imagenet_resnet50",
                cells=_beside(
                    IMAGENET,
                    {
                        "none": (76.13, 92.86),
                        "random_erasing": 77.02,
                        "grid_mask": 77.28,
                        "cutmix": 77.91,
                        "saliency_mix": 78.12,
                        "keep_augment": 78.34,
                        "scae": (78.87, 94.52),
                    },
                ),
            ),
        ),
        note=f"{PER_IMAGE} The paper says that SCAE takes about 8 % more training time. Other "
        "methods were published with more epochs: CutMix and GridMask with 300.",
    ),
    "3": Table(
        title="CIFAR-100-LT",
        models=("cifar_resnet32",),
        epochs=200,
        sections=(_long_tail(100), _long_tail(50)),
        note=f"{PER_IMAGE} Random Erasing with p = 0.37 is a control: SCAE's p averages that much "
        "over the samples. MiSLAS' second stage, 10 epochs of the classifier alone, goes with any "
        "first; that on none and on SCAE, and SCAE in the first stage, are ours. Both stages have "
        "the authors' settings: weight decay 2e-4, no Nesterov momentum, and epochs of as many "
        "images as the data set has. Earlier results have 5e-4, Nesterov momentum and, for "
        "imbalance 100, 4.6 times as many steps in the second stage. Other sources have, for "
        "imbalance 100 (50): LDAM-DRW 42.0, BBN 42.6 (47.0), Remix-DRW 46.8.",
    ),
    "4": Table(
        title="ablation",
        models=("cifar_resnet32",),
        epochs=200,
        sections=(
            Section(
                name="balanced",
                title="CIFAR-100",
                recipe="cifar100",
                cells=_beside(
                    ABLATION_BALANCED,
                    CIFAR_PAPER,
                    {"cifar_resnet32": CIFAR_INDEPENDENT["cifar_resnet32"]},
                ),
            ),
            Section(
                name="lt",
                title="CIFAR-100-LT, imbalance 100",
                recipe="cifar100_lt",
                overrides=("data.imbalance=100",),
                cells=_beside(
                    ABLATION_LONG_TAIL,
                    LONG_TAIL_PAPER[100],
                    {"cifar_resnet32": LONG_TAIL_INDEPENDENT[100]},
                ),
                contrasts=(
                    ("uniform_p37", "random_erasing_p37"),
                    ("class_alone", "uniform_p37"),
                    ("class_alone", "random_erasing_p37"),
                    ("unguided", "class_alone"),
                    ("scae", "unguided"),
                    ("guided_class", "class_alone"),
                    ("area_20", "scae"),
                    ("lam_4", "scae"),
                    ("lam_8", "scae"),
                    ("tail_protected", "scae"),
                ),
            ),
        ),
        note="On balanced data f_k = 1 for every class, so that class-aware means p = p_max and "
        "nothing else: a gain of it there is a gain of p, and SCAE with p = 0.372 is the control. "
        "The paper's figures for the long tail are those of its Table 3. Guidance of a fixed "
        "strength is not among the settings: it always grows with the epoch.",
    ),
    "lt": Table(
        title="CIFAR-100-LT by loss and augmentation",
        models=("cifar_resnet32",),
        epochs=200,
        sections=(*_grid(100, 0), *_grid(50, 7)),
        note="All cells have the settings of cifar100_lt.yaml, except MiSLAS and the baseline of "
        "LDAM-DRW, which have their authors'. So CMO is trained with a weight decay of 5e-4, where "
        "its authors have 2e-4. `adjusted` is of the same networks: the logarithm of the class "
        "shares is taken off their logits (post-hoc logit adjustment), unless the loss has "
        "already added it in training.",
    ),
}
