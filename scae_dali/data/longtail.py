"""Long-tailed subsets of balanced data: how many samples each class keeps, and which.

The profile and the draw are those of LDAM-DRW (Cao et al., NeurIPS 2019), so that the published
CIFAR-LT subsets come out sample by sample where the data set is in its native order.
"""

import numpy as np
import numpy.typing as npt

from scae_dali.checks import check

__all__ = ["choose", "imbalanced", "profile"]

Int64 = npt.NDArray[np.int64]


def profile(most: int, num_classes: int, imbalance: float) -> Int64:
    """n_k = int(most · (1/imbalance)^(k/(K-1))), int64 [K]: class 0 keeps `most`, the last one
    most/imbalance. Raises ValueError."""
    check(most >= 1, f"most must be at least 1, got {most}")
    check(num_classes >= 1, f"num_classes must be at least 1, got {num_classes}")
    check(
        imbalance >= 1,
        f"imbalance must be at least 1, the largest class over the smallest, got {imbalance}; "
        f"published subsets have 10, 50 and 100",
    )
    # LDAM-DRW's order of operations: int() makes a whole sample of a rounding error.
    last = max(num_classes - 1, 1)
    return np.array(
        [int(most * (1 / imbalance) ** (k / last)) for k in range(num_classes)], dtype=np.int64
    )


def choose(labels: npt.ArrayLike, counts: npt.ArrayLike, *, seed: int = 0) -> Int64:
    """The samples that stay. labels: int [N]; counts: int [K], samples to keep of each class.

    Class by class, the ascending ids are shuffled and the first n_k taken. Returns ids, int64 [M],
    class by class in the order taken. seed: the published subsets have 0. Raises ValueError.
    """
    counts = np.asarray(counts)
    check(
        counts.ndim == 1 and counts.dtype.kind in "iu" and (counts.size == 0 or counts.min() >= 0),
        f"counts must be integers >= 0 of shape [K], got {counts.dtype} of shape {counts.shape}",
    )
    check(0 <= seed < 1 << 32, f"seed must be in [0, 2^32), got {seed}")
    have = _class_counts(labels, len(counts))
    if (short := np.flatnonzero(have < counts)).size:
        k = short[0]
        raise ValueError(
            f"counts asks for {counts[k]} samples of class {k}, which has {have[k]}; "
            f"np.minimum(counts, class_counts) takes what there is"
        )
    ids = np.argsort(np.asarray(labels), kind="stable").astype(np.int64)
    # The legacy generator: np.random.seed(0) and np.random.shuffle made the published subsets.
    random = np.random.RandomState(seed)
    chosen = [np.empty(0, dtype=np.int64)]
    for members, count in zip(np.split(ids, np.cumsum(have)[:-1]), counts, strict=True):
        random.shuffle(members)
        chosen.append(members[:count])
    return np.concatenate(chosen)


def imbalanced(
    labels: npt.ArrayLike, num_classes: int, imbalance: float, *, seed: int = 0
) -> Int64:
    """`choose` by the `profile` under the largest class, for any data set. labels: int [N].

    A class that has less than its share gives all it has. Returns ids, int64 [M]. Raises
    ValueError, also where a class would keep no sample.
    """
    have = _class_counts(labels, num_classes)
    most = int(have.max(initial=0))
    counts = np.minimum(profile(most, num_classes, imbalance), have)
    if (lost := np.flatnonzero(counts == 0)).size:
        k = lost[0]
        raise ValueError(
            f"imbalance={imbalance:g} leaves no sample of class {k}, which has {have[k]}: "
            + (
                f"the largest class has {most}, so give an imbalance below {most}"
                if have[k]
                else "leave the class out of the data set, or give it samples"
            )
        )
    return choose(labels, counts, seed=seed)


def _class_counts(labels: npt.ArrayLike, num_classes: int) -> Int64:
    """Samples per class, int64 [K]. Raises ValueError for labels that are none."""
    array = np.asarray(labels)
    check(
        array.ndim == 1 and array.size > 0 and array.dtype.kind in "iu",
        f"labels must be integers of shape [N], got {array.dtype} of shape {array.shape}",
    )
    check(
        array.min() >= 0 and array.max() < num_classes,
        f"labels must lie in 0 … {num_classes - 1}, got {array.min()} … {array.max()}",
    )
    return np.bincount(array, minlength=num_classes).astype(np.int64)
