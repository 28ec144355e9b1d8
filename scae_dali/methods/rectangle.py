"""Shared by the methods that erase a rectangle: its size, and the DALI operators that fill it."""

from typing import Any

from array_api_compat import array_namespace
from nvidia.dali import fn, types

from scae_dali import region
from scae_dali.config import RectangleConfig
from scae_dali.methods.base import DataNode, Run, Samples
from scae_dali.rng import Array, Stream, derive

_FIRST_TRIES = 3  # nearly always enough; more are drawn for the samples that need them


def fields(config: RectangleConfig) -> dict[str, int]:
    """What the plan has besides the box: the colour, where it varies."""
    return {"color": 3} if config.fill == "color" else {}


def choose(
    samples: Samples, run: Run, config: RectangleConfig, prob: float | Array
) -> tuple[Array, Array, Array]:
    """Which samples are erased, and how large the rectangle is.

    prob: of erasing, float or float64 [B]. Returns int64 [n], rows of `samples`; int64 [n, 2],
    (h, w) in pixels, see region.draw_size; bool [n], whether a size fitted.
    """
    xp = array_namespace(samples.ids)
    tries = min(_FIRST_TRIES, config.tries)
    u = samples.draw(run, Stream.ERASE, 1 + 2 * tries)
    rows = xp.nonzero(u[:, 0] < prob)[0]
    hw, fitted = _sizes(u[rows, 1:], samples.size_px[rows], config)
    again = xp.nonzero(~fitted)[0]
    if again.shape[0] and config.tries > tries:
        unfit = samples.take(rows[again])
        u = unfit.draw(run, Stream.ERASE, 1 + 2 * config.tries)
        hw[again], fitted[again] = _sizes(u[:, 1:], unfit.size_px, config)
    return rows, hw, fitted


def _sizes(u, size_px, config):
    pairs = array_namespace(u).reshape(u, (u.shape[0], u.shape[1] // 2, 2))
    return region.draw_size(pairs, size_px, config.area, config.aspect)


def fill_fields(samples: Samples, run: Run, config: RectangleConfig) -> dict[str, Array]:
    """The plan's `color`, float64 [B, 3] in grey levels, where the fill needs it."""
    if config.fill != "color":
        return {}
    return {"color": 255 * samples.draw(run, Stream.COLOR, 3)}


def erase(images: DataNode, plan: Any, run: Run, config: RectangleConfig) -> DataNode:
    """Eq. 1. images: HWC with 3 channels, CPU or GPU; a box of no area leaves an image as it is."""
    where = {
        "anchor": plan.part("box", types.FLOAT, slice(0, 2)),
        "shape": plan.part("box", types.FLOAT, slice(2, 4)),
        "axis_names": "HW",
    }
    if config.fill == "noise":
        # fn.erase knows one value a channel: cut a mask with it and blend.
        keep = fn.erase(images * 0 + 1, fill_value=0, **where)
        noise = fn.random.normal(keep, dtype=types.FLOAT, seed=derive(run.seed, "noise"))
        std, mean = (types.Constant(v, device=images.device) for v in (run.std, run.mean))
        noise = noise * std + mean
        return fn.cast_like(images * keep + noise * (1 - keep), images)
    if config.fill == "color":
        fill = plan.part("color", types.FLOAT)
    elif config.fill == "zero":
        fill = (0.0, 0.0, 0.0)
    else:  # fn.erase truncates to the type of the images: round what is meant for bytes
        fill = tuple(round(m) for m in run.mean) if max(run.mean) > 1 else run.mean
    return fn.erase(images, fill_value=fill, **where)
