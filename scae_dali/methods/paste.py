"""Shared by the methods that paste a box of another image: its geometry, and the operator."""

from typing import Any

import numpy as np
from nvidia.dali import fn, types

from scae_dali.methods.base import DataNode


def fields(name: str) -> dict[str, int]:
    """The plan's fields for fn.multi_paste, which takes two regions: the whole image and a box."""
    return {f"{name}_anchors": 4, f"{name}_shapes": 4}


def box_of_share(share: np.ndarray, centre: np.ndarray, size_px: np.ndarray) -> np.ndarray:
    """A box of about this share of the image and of its aspect, clipped at its borders.

    share: float64 [B]. centre, size_px: int64 [B, 2]. As CutMix's authors round: the sides are
    whole pixels, and half of them lie on each side of the centre, whole pixels too. Returns int64
    [B, 4], (y, x, h, w).
    """
    half = (size_px * np.sqrt(share)[:, None]).astype(np.int64) // 2
    begin = np.maximum(centre - half, 0)
    end = np.minimum(centre + half, size_px)
    return np.concatenate([begin, end - begin], axis=1)


def plan_of(name: str, box: np.ndarray, size_px: np.ndarray) -> dict[str, np.ndarray]:
    """The fields for boxes int64 [B, 4] of images of size_px, int64 [B, 2]; a box of no area pastes
    nothing."""
    # DALI's GPU kernel takes an empty region for one that reaches to the image's end. So an empty
    # one begins there.
    empty = (box[:, 2:] == 0).any(axis=1)[:, None]
    anchor = np.where(empty, size_px, box[:, :2])
    shape = np.where(empty, 0, box[:, 2:])
    return {
        f"{name}_anchors": np.concatenate([np.zeros_like(size_px), anchor], axis=1),
        f"{name}_shapes": np.concatenate([size_px, shape], axis=1),
    }


def around(
    name: str, share: np.ndarray, centre: np.ndarray, size_px: np.ndarray
) -> dict[str, np.ndarray]:
    """`mu`, the share of its area that an image keeps, and the fields for a box of it.

    share, centre, size_px: see box_of_share; a share of 0 pastes nothing.
    """
    box = box_of_share(share, centre, size_px)
    mu = 1 - box[:, 2] * box[:, 3] / (size_px[:, 0] * size_px[:, 1])
    return {"mu": mu} | plan_of(name, box, size_px)


def paste(name: str, images: DataNode, others: DataNode, plan: Any) -> DataNode:
    """Images (HWC) with the boxes of others, as large as they are, at the same position."""
    anchors, shapes = (
        fn.reshape(plan.part(field, types.INT32), shape=[2, 2]) for field in fields(name)
    )
    return fn.multi_paste(
        images,
        others,
        in_anchors=anchors,
        out_anchors=anchors,
        shapes=shapes,
        output_size=plan.part(f"{name}_shapes", types.INT32, slice(0, 2)),
    )
