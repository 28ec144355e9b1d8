"""Shared by the methods that erase: how large a rectangle is, and DALI operators that fill it."""

from typing import Any, ClassVar, Protocol

import numpy as np
from nvidia.dali import fn, types

from scae_dali.config import Fill, RectangleConfig
from scae_dali.methods.base import DataNode, Kind, Run, Samples
from scae_dali.plan import region
from scae_dali.plan.random import Stream, derive

_FIRST_TRIES = 3  # nearly always enough; more are drawn for the samples that need them


class Filled(Protocol):
    """The settings of a method that erases, whatever the shape."""

    @property
    def fill(self) -> Fill: ...


def fields(config: Filled, run: Run) -> dict[str, int]:
    """What the plan has besides the region: the colour, where it varies."""
    if config.fill != "color":
        return {}
    if not run.grey_levels:
        raise ValueError(
            f"mean must be in grey levels where fill is color, got {run.mean}; erase before the "
            "normalisation, or pass another fill"
        )
    return {"color": 3}


class Erasing:
    """A method that erases boxes by `erase`; what is planned is for subclasses."""

    kinds: ClassVar[tuple[Kind, ...]] = ("erase",)
    conditional: ClassVar[bool] = False

    def __init__(self, config: Filled, run: Run) -> None:
        self.config = config
        self.run = run
        self.fields = fields(config, run)

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return erase(images, plan, self.run, self.config)


def choose(
    samples: Samples, run: Run, config: RectangleConfig, prob: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which samples are erased, and how large the rectangle is.

    prob: of erasing, float or float64 [B]. Returns int64 [n], rows of `samples`; int64 [n, 2],
    (h, w) in pixels, see region.draw_size; bool [n], whether a size fitted.
    """
    tries = min(_FIRST_TRIES, config.tries)
    u = samples.draw(run, Stream.ERASE, 1 + 2 * tries)
    rows = np.flatnonzero(u[:, 0] < prob)
    hw, fitted = _sizes(u[rows, 1:], samples.size_px[rows], config)
    again = np.flatnonzero(~fitted)
    if len(again) and config.tries > tries:
        unfit = samples.take(rows[again])
        u = unfit.draw(run, Stream.ERASE, 1 + 2 * config.tries)
        hw[again], fitted[again] = _sizes(u[:, 1:], unfit.size_px, config)
    return rows, hw, fitted


def _sizes(u, size_px, config):
    pairs = u.reshape(len(u), u.shape[1] // 2, 2)
    return region.draw_size(pairs, size_px, config.area, config.aspect, config.aspect_law)


def fill_fields(samples: Samples, run: Run, config: Filled) -> dict[str, np.ndarray]:
    """The plan's `color`, float64 [B, 3] in grey levels, where the fill needs it."""
    if config.fill != "color":
        return {}
    return {"color": 255 * samples.draw(run, Stream.COLOR, 3)}


def erase(images: DataNode, plan: Any, run: Run, config: Filled) -> DataNode:
    """Eq. 1. images: HWC with 3 channels, CPU or GPU; a box of no area leaves an image as it is."""
    if config.fill in ("mean", "zero") and plan.fills(images, _value(plan, run, config)):
        return images
    anchor = plan.part("box", types.FLOAT, slice(0, 2))
    shape = plan.part("box", types.FLOAT, slice(2, 4))
    return erase_regions(images, anchor, shape, plan, run, config)


def erase_regions(
    images: DataNode, anchor: DataNode, shape: DataNode, plan: Any, run: Run, config: Filled
) -> DataNode:
    """Fill any number of rectangles of an image. anchor, shape: float32 [2n], y and x in turns."""
    where = {"anchor": anchor, "shape": shape, "axis_names": "HW"}
    if config.fill == "noise":
        # fn.erase knows one value a channel: cut a mask with it.
        keep = fn.erase(images * 0 + 1, fill_value=0, **where)
        return fill_where(images, keep, plan, run, config)
    return fn.erase(images, fill_value=_value(plan, run, config), **where)


def fill_where(images: DataNode, keep: DataNode, plan: Any, run: Run, config: Filled) -> DataNode:
    """images where keep is 1, filled where it is 0. keep: of their shape, any type."""
    if config.fill == "noise":
        value = fn.random.normal(keep, dtype=types.FLOAT, seed=derive(run.seed, "noise"))
        std, mean = (types.Constant(v, device=images.device) for v in (run.std, run.mean))
        value = value * std + mean
    elif config.fill == "color":
        value = _value(plan, run, config)
        value = value if images.device == "cpu" else value.gpu()
    else:
        value = types.Constant(_value(plan, run, config), device=images.device)
    return fn.cast_like(images * keep + value * (1 - keep), images)


def _value(plan: Any, run: Run, config: Filled) -> Any:
    """One value a channel, of every fill but noise."""
    if config.fill == "color":
        return plan.part("color", types.FLOAT)
    if config.fill == "zero":
        return (0.0, 0.0, 0.0)
    # fn.erase truncates to the type of the images: round what is meant for bytes.
    return tuple(round(m) for m in run.mean) if run.grey_levels else run.mean
