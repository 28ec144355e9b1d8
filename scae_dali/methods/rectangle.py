"""Shared by the methods that erase a rectangle: its size, and the DALI operators that fill it."""

from collections.abc import Mapping

from array_api_compat import array_namespace
from nvidia.dali import fn, types

from scae_dali import region
from scae_dali.config import RectangleConfig
from scae_dali.methods.base import DataNode, Run, Samples
from scae_dali.rng import Array, Stream, derive

_FIRST_TRIES = 3  # nearly always enough; more are drawn for the samples that need them


def fields(config: RectangleConfig) -> dict[str, int]:
    """The plan's fields: box (y, x, h, w) in pixels of the crop, and the colour where it varies."""
    return {"box": 4} | ({"color": 3} if config.fill == "color" else {})


def draw_size(samples: Samples, run: Run, config: RectangleConfig) -> tuple[Array, Array]:
    """Sizes int64 [B, 2] and whether one fitted, bool [B]; see region.draw_size."""
    size, fitted = _draw_size(samples, run, config, min(_FIRST_TRIES, config.tries))
    xp = array_namespace(size)
    again = xp.nonzero(~fitted)[0]
    if again.shape[0] and config.tries > _FIRST_TRIES:
        size[again], fitted[again] = _draw_size(samples.take(again), run, config, config.tries)
    return size, fitted


def _draw_size(samples, run, config, tries):
    xp = array_namespace(samples.ids)
    u = xp.reshape(samples.draw(run, Stream.SIZE, 2 * tries), (-1, tries, 2))
    return region.draw_size(u, samples.size_px, config.area, config.aspect)


def fill_fields(samples: Samples, run: Run, config: RectangleConfig) -> dict[str, Array]:
    """The plan's `color`, float64 [B, 3] in grey levels, where the fill needs it."""
    if config.fill != "color":
        return {}
    return {"color": 255 * samples.draw(run, Stream.COLOR, 3)}


def erase(
    images: DataNode, plan: Mapping[str, DataNode], run: Run, config: RectangleConfig
) -> DataNode:
    """Eq. 1. images: HWC with 3 channels, CPU or GPU; a box of no area leaves an image as it is."""
    box = plan["box"]
    where = {"anchor": box[0:2], "shape": box[2:4], "axis_names": "HW"}
    if config.fill == "noise":
        # fn.erase knows one value a channel: cut a mask with it and blend.
        keep = fn.erase(images * 0 + 1, fill_value=0, **where)
        noise = fn.random.normal(keep, dtype=types.FLOAT, seed=derive(run.seed, "noise"))
        noise = noise * types.Constant(run.std) + types.Constant(run.mean)
        return images * keep + fn.cast_like(noise, images) * (1 - keep)
    # fn.erase truncates to the type of the images: round what is meant for bytes.
    mean = tuple(round(m) for m in run.mean) if max(run.mean) > 1 else run.mean
    fill = {"mean": mean, "zero": (0.0, 0.0, 0.0), "color": plan.get("color")}[config.fill]
    return fn.erase(images, fill_value=fill, **where)
