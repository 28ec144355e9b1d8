"""Boxes that are pasted from one image into another, as CutMix draws them."""

import numpy as np


def pasted(plan):
    """The boxes, int64 [B, 4]; the first regions must be whole images."""
    anchors, shapes = plan["paste_anchors"], plan["paste_shapes"]
    assert (anchors[:, :2] == 0).all()
    return np.concatenate([anchors[:, 2:], shapes[:, 2:]], axis=1)


def oracle_box(lam, centre, size):
    """CutMix's box: sides √(1 - λ) of the image's, around the centre, clipped; an empty one lies at
    the image's end, for DALI's kernel for GPUs takes it to reach from its begin to there."""
    (cy, cx), (height, width) = centre, size
    h, w = int(height * (1 - lam) ** 0.5), int(width * (1 - lam) ** 0.5)
    top, bottom = max(cy - h // 2, 0), min(cy + h // 2, height)
    left, right = max(cx - w // 2, 0), min(cx + w // 2, width)
    if bottom == top or right == left:
        return [height, width, 0, 0]
    return [top, left, bottom - top, right - left]


def check_cutmixs(plan, mixed, lam, u, crop):
    """The boxes and weights of a plan are those of CutMix, for what batch.draw has given."""
    for k, box in enumerate(pasted(plan)):
        centre = [int(u[k, axis] * crop[axis]) for axis in (0, 1)]
        wanted = oracle_box(lam[k], centre, crop) if mixed[k] else [*crop, 0, 0]
        assert box.tolist() == wanted
        assert plan["mu"][k] == 1 - wanted[2] * wanted[3] / (crop[0] * crop[1])
