"""What a mix draws: its weight, as in MixUp (Zhang et al., ICLR 2018), and the partner, by eq. 8 or
as in CMO (Park et al., CVPR 2022).

The random numbers are passed in.
"""

import numpy as np
from scipy.special import betaincinv


def mix_weight(u: np.ndarray, alpha: float) -> np.ndarray:
    """μ ~ Beta(alpha, alpha), by the inverse of its distribution function.

    u: float64 [B] in (0, 1) -> float64 [B] in [0, 1].
    """
    return betaincinv(alpha, alpha, u)


def draw_in_batch(u: np.ndarray, weights: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Partners from the batch: positions in it, int64 [n].

    u: float64 [n] in (0, 1). weights: float64 [n, B], how likely each image of the batch is the
    partner of each that is mixed, up to a factor. own: int64 [n], the positions of those, which
    never get themselves if the batch has another image. If no other one has a weight, all have the
    same.
    """
    weights = weights.copy()
    weights[np.arange(len(own)), own] = 0
    none = ~weights.any(axis=1)
    weights[none] = 1
    if weights.shape[1] > 1:
        weights[np.arange(len(own)), own] = 0
    end = np.cumsum(weights, axis=1)
    return (end <= u[:, None] * end[:, -1:]).sum(axis=1).clip(max=weights.shape[1] - 1)


class Partners:
    """Draws the partners of samples.

    labels: int64 [N], of every sample. num_classes: K.
    """

    def __init__(self, labels: np.ndarray, num_classes: int) -> None:
        self._members = np.argsort(labels, kind="stable")  # class by class
        self._counts = np.bincount(labels, minlength=num_classes)
        self._begin = np.cumsum(self._counts) - self._counts
        self._rank = np.empty_like(self._members)  # of a sample within its class
        self._rank[self._members] = np.arange(len(labels)) - self._begin[labels[self._members]]

    def draw(
        self, u: np.ndarray, ids: np.ndarray, labels: np.ndarray, neighbors: np.ndarray | None
    ) -> np.ndarray:
        """Partners of the sample's class or a neighbouring one: ids, int64 [B].

        u: float64 [B, 2] in (0, 1). ids, labels: int64 [B]. neighbors: int [K, m], the classes next
        to each; None: unknown. First a class is drawn, own and neighbours equally likely, then one
        of its samples. A neighbour without samples counts as the own class. A sample never gets
        itself if its class has another one; if not, the class is a neighbour's, if there is any.
        """
        chosen = labels
        if neighbors is not None and neighbors.shape[1]:
            near = neighbors.astype(np.int64)[labels]  # [B, m]
            near = np.where(self._counts[near] > 0, near, labels[:, None])
            classes = np.concatenate([labels[:, None], near], axis=1)
            alone = self._counts[labels] == 1
            m = near.shape[1]
            which = np.where(alone, 1 + np.floor(u[:, 0] * m), np.floor(u[:, 0] * (m + 1)))
            chosen = classes[np.arange(len(ids)), which.astype(np.int64)]
        own = (chosen == labels) & (self._counts[labels] > 1)
        k = np.floor(u[:, 1] * (self._counts[chosen] - own)).astype(np.int64)
        k += own & (k >= self._rank[ids])  # leaves the sample itself out
        return self._members[self._begin[chosen] + k]

    def draw_from_all(self, u: np.ndarray, power: float) -> np.ndarray:
        """Partners from the whole set, each sample with a probability in proportion to 1/n_k^power,
        where n_k is the size of its class: ids, int64 [B].

        u: float64 [B, 2] in (0, 1). First a class is drawn, P(k) ∝ n_k^(1 - power), then one of its
        samples, all equally likely.
        """
        present = np.flatnonzero(self._counts)
        counts = self._counts[present]
        end = np.cumsum((counts / counts.min()) ** (1 - power))
        chosen = present[np.searchsorted(end[:-1], u[:, 0] * end[-1], side="right")]
        k = np.floor(u[:, 1] * self._counts[chosen]).astype(np.int64)
        return self._members[self._begin[chosen] + k]
