"""The partner of a sample, the second image of a mix, inside a DALI graph.

It is read, decoded and cropped behind a DALI conditional, for the samples that are mixed and no
others, so the pipeline must be defined with `enable_conditionals=True`. The plan says which sample
is the partner, and with what weight it is mixed in. It is blended with the sample's crop before the
method acts, or the method pastes a box of it. Where the images of the index cannot be read, the
partner is another image of the batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert

from scae_dali.data.index import ImageIndex
from scae_dali.methods.base import NO_PARTNERS, DataNode, require_conditionals
from scae_dali.plan.crop import CropConfig
from scae_dali.stage.blend import blended
from scae_dali.stage.images import IN_PIXELS, cut
from scae_dali.stage.table import Planner

# (encoded, start int32 [2], shape int32 [2]) -> the windows of the partners, HWC, as large as the
# images that they are mixed into. Where a batch has nothing to mix, these are batches of no samples
# and, behind a GPU decoder, without a layout. fn.resize would fail on them, fn.slice does not: so
# decode a partner whole on a GPU and slice its window out, rather than decode the window alone.
Fetch = Callable[[DataNode, DataNode, DataNode], DataNode]


def mix(images: DataNode, plan: Any, crop: CropConfig, fetch: Fetch) -> DataNode:
    """μ·image + (1 - μ)·partner where the plan says so; the other images are left as they are.

    Where the method pastes, all images are left as they are, and its `apply` fetches the partners.

    images: HWC, before the flip. plan: PlanNodes, whose `partners_mixed` is set. crop: how the
    partners are cropped. Raises ValueError in a pipeline without conditionals.
    """
    require_conditionals("samples are mixed", NO_PARTNERS)
    plan.partners_mixed = True
    partners = partial(_fetched, plan, crop, fetch)
    if plan.planner.in_batch:
        others = fn.permute_batch(images, indices=plan.scalar("source", types.INT32))
        partners = partial(_given, others, plan.row)
    if plan.planner.pastes:
        plan.partners = partners
    elif plan.mixed:
        images = _blend(images, plan, partners)
    return images


def decode_crop(
    encoded: DataNode,
    start: DataNode,
    shape: DataNode,
    *,
    size: tuple[int, int] | DataNode,
    crop: CropConfig,
    device: str,
    **on_gpu: Any,
) -> DataNode:
    """A Fetch: the window (start, shape) of an image, resized.

    size: (h, w) in pixels, or a node that gives it, float32 [2]. crop: how windows are drawn.
    device: `cpu` or `gpu`, where the image is decoded. on_gpu: arguments of DALI's decoder there.
    """
    if device != "cpu":
        images = fn.decoders.image(encoded, device="mixed", **on_gpu)
    elif crop.kind == "pad":  # a window may reach outside
        images = fn.decoders.image(encoded)
    else:
        images = fn.decoders.image_slice(encoded, start, shape, axes=(0, 1), **IN_PIXELS)
        return fn.resize(images, size=size)
    return cut(images, start, shape, size)


@do_not_convert
def missing(index: ImageIndex) -> str | None:
    """An image of the index that cannot be read, as members of archives in a list; None where the
    images are there."""
    if index.archives is not None:
        return None
    rarest = int(index.class_counts[index.labels].argmin())  # some class of the tail, if any is
    path = os.path.join(index.root, index.files[rarest])
    return None if os.path.isfile(path) else path


def _given(others, row):
    return others, row


def _blend(images, plan, partners):
    other, _ = partners()
    mu = plan.scalar("mu", types.FLOAT)
    if images.device == "cpu":
        return fn.python_function(
            images, other, mu, function=blended, batch_processing=True, output_layouts="HWC"
        )
    return fn.cast_like(images * mu + other * (1.0 - mu), images)


def _fetched(plan, crop, fetch):
    """The partners' crops, flipped where drawn so, and the settled rows of the plan."""
    encoded = fn.python_function(
        plan.row, function=partial(_encoded, plan.planner), batch_processing=True
    )
    if plan.planner.index.archives is None:
        encoded = fn.io.file.read(encoded)
    row, start, shape, flip = fn.python_function(
        plan.row,
        fn.peek_image_shape(encoded),
        function=partial(_settle, plan.planner, crop),
        num_outputs=4,
        batch_processing=True,
    )
    return fn.flip(fetch(encoded, start, shape), horizontal=flip), row


def _encoded(planner: Planner, rows: list[np.ndarray]) -> list[np.ndarray]:
    """The partners' encoded images, or the paths of their files."""
    column, index = planner.columns["partner_id"].start, planner.index
    ids = [int(row[column]) for row in rows]
    return index.encoded_paths(ids) if index.archives is None else index.read(ids)


def _settle(planner: Planner, crop: CropConfig, rows, shapes) -> tuple[list, list, list, list]:
    """Settled rows, start and shape of the crops, int32 [2], and whether to flip, int32 scalar."""
    full_px = np.stack(shapes)[:, :2].astype(np.int64)
    settled, window, flip = planner.settle(np.stack(rows), full_px, crop)
    window = window.astype(np.int32)
    flips = [np.array(f, np.int32) for f in flip]  # DALI takes no NumPy scalars
    return list(settled), list(window[:, :2]), list(window[:, 2:]), flips
