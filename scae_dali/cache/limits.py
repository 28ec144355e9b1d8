"""What a saliency cache can hold of a run, told before the run begins.

A map carries its epoch in 16 bits, and a neighbouring class is a number of 16 bits.
"""

from scae_dali.cache.records import CLASSES, EPOCHS
from scae_dali.checks import check
from scae_dali.plan import schedule

__all__ = ["check_last_pass", "check_neighbors"]


def check_last_pass(epochs: int, refresh_every: int) -> None:
    """Raises ValueError where a pass would come at an epoch that no map can carry."""
    last = schedule.pass_epoch(epochs - 1, refresh_every)
    if last is None or last < EPOCHS:
        return
    most = ((EPOCHS - 1) // refresh_every + 1) * refresh_every
    raise ValueError(
        f"epochs must be at most {most} with refresh_every={refresh_every}, got {epochs}: the last "
        f"saliency pass would come at epoch {last}, and maps carry epochs up to {EPOCHS - 1}; "
        "lower epochs, or set refresh_every=0 and name a cache that was built offline"
    )


def check_neighbors(neighbors: int, num_classes: int) -> None:
    """Raises ValueError where the cache cannot hold neighbours of so many classes."""
    check(
        not neighbors or num_classes <= CLASSES,
        f"neighbors must be 0 where there are more than {CLASSES:,} classes (a cache keeps the "
        f"neighbours of a class in 16 bits), got neighbors={neighbors} and {num_classes:,} "
        "classes; with 0, tail classes are mixed with themselves alone",
    )
