"""Shared by the methods that look at saliency maps: fetching them, and what is wrong with them."""

from scae_dali.methods.base import Run, Samples, Status, zeros
from scae_dali.plan.random import Array, array_namespace


def maps(samples: Samples, run: Run) -> tuple[Array, Array, Array]:
    """Â float64 [B, gh, gw] in [0, 1]; whether it says anything, bool [B]; status, int64 [B], with
    NO_MAP where it is missing and FLAT_MAP where it is constant. Without a cache all are missing,
    which is no news: status is 0."""
    xp = array_namespace(samples.ids)
    status = xp.zeros_like(samples.ids)
    if run.saliency is None:
        b = samples.ids.shape[0]
        return zeros(samples.ids, b, 1, 1), xp.astype(status, xp.bool), status
    stored, found = run.saliency(samples.ids)
    flat = found & xp.all(stored == stored[:, :1, :1], axis=(1, 2))
    status = xp.where(found, status, int(Status.NO_MAP))
    status = status + xp.where(flat, int(Status.FLAT_MAP), 0)
    return xp.astype(stored, xp.float64) / 255, found & ~flat, status
