"""Which rectangle to erase: its size, and its centre by eq. 4, exactly, over the crop's pixels.

Â is bilinear between the centres of the map's cells (`align_corners=False`), constant beyond the
outermost ones, and 0 outside the image. Summing exp(λ·Â) over every pixel of every crop would cost
fifty times the budget, so the centre is drawn by rejection: over each patch of the grid on which Â
is bilinear, exp(λ·Â) is at most its value at one of the four corners, which gives an envelope of
some hundred patches. A proposal is a patch in proportion to its envelope, a pixel uniform in it,
and is accepted with exp(λ·Â) over the envelope. Where all PROPOSALS fail, the centre is drawn from
the full sum over pixels: both branches follow eq. 4, hence so does their mixture.

Functions of arrays (NumPy or torch); random numbers are given.
"""

import functools
import math

import numpy as np
from array_api_compat import array_namespace

from scae_dali.config import AspectLaw, Border, Range
from scae_dali.rng import Array

PROPOSALS = 8
DRAWS = 4 * PROPOSALS + 1  # uniforms that draw_centre reads a sample
_PATCH_LAMBDA = 2.0  # patches are divided until |λ| times the span of Â is at most about this


def draw_size(
    u: Array, size_px: Array, area: Range, aspect: Range, law: AspectLaw = "uniform"
) -> tuple[Array, Array]:
    """Area a ~ U[area] of the crop, aspect r = h/w: h = √(a·HW·r), w = √(a·HW/r).

    u: float64 [B, tries, 2] in (0, 1). size_px: int64 [B, 2], (H, W). law: r ~ U[aspect], or
    log r is uniform. The first try with 1 <= h < H and 1 <= w < W counts, as in Random Erasing.
    Returns (int64 [B, 2] sizes (h, w) in pixels, bool [B] whether a try fitted; the size is 0 where
    none did).
    """
    xp = array_namespace(u)
    height = xp.astype(size_px[:, 0:1], xp.float64)
    width = xp.astype(size_px[:, 1:2], xp.float64)
    a = (area[0] + (area[1] - area[0]) * u[:, :, 0]) * (height * width)
    if law == "log":
        low, high = math.log(aspect[0]), math.log(aspect[1])
        r = xp.exp(low + (high - low) * u[:, :, 1])
    else:
        r = aspect[0] + (aspect[1] - aspect[0]) * u[:, :, 1]
    h, w = xp.round(xp.sqrt(a * r)), xp.round(xp.sqrt(a / r))  # [B, tries]
    fits = (h >= 1) & (h < height) & (w >= 1) & (w < width)
    rows = _arange(xp, u.shape[0], u)
    first = xp.argmax(xp.astype(fits, xp.int8), axis=1)
    fitted = fits[rows, first]
    size = xp.stack([h[rows, first], w[rows, first]], axis=1)
    return xp.astype(xp.where(fitted[:, None], size, xp.zeros_like(size)), xp.int64), fitted


def centre_range(hw_px: Array, size_px: Array, border: Border) -> tuple[Array, Array]:
    """The pixels that may be the centre: first and last, inclusive, int64 [B, 2] each.

    The centre of a rectangle that begins at pixel y and is h high is pixel y + h // 2.
    """
    xp = array_namespace(hw_px)
    if border == "clip":
        return xp.zeros_like(hw_px), size_px - 1
    return hw_px // 2, size_px - hw_px + hw_px // 2


def box_at(centre: Array, hw_px: Array, size_px: Array) -> Array:
    """The rectangle around a centre, clipped to the crop. int64 [B, 2] each -> int64 [B, 4]."""
    xp = array_namespace(centre)
    begin = centre - hw_px // 2
    end = xp.minimum(begin + hw_px, size_px)
    begin = xp.maximum(begin, xp.zeros_like(begin))
    return xp.concat([begin, end - begin], axis=1)


def saliency_at(saliency: Array, position: Array, axis_window: Array) -> Array:
    """Â at pixels of the crop.

    saliency: float64 [B, gh, gw]. position: int64 [B, N, 2], pixels (y, x). axis_window: float64
    [B, 2, 2]: per axis, v = start + step · (pixel + ½) is the place in the full frame.
    Returns float64 [B, N].
    """
    xp = array_namespace(saliency)
    gh, gw = saliency.shape[1:]
    v = axis_window[:, None, :, 0] + axis_window[:, None, :, 1] * (
        xp.astype(position, xp.float64) + 0.5
    )
    inside = xp.all((v >= 0) & (v <= 1), axis=2)
    y = (v[..., 0] * gh - 0.5).clip(0.0, gh - 1.0)
    x = (v[..., 1] * gw - 0.5).clip(0.0, gw - 1.0)
    y0, x0 = xp.floor(y), xp.floor(x)
    ty, tx = y - y0, x - x0
    y0, x0 = xp.astype(y0, xp.int64), xp.astype(x0, xp.int64)
    y1 = (y0 + 1).clip(max=gh - 1)
    x1 = (x0 + 1).clip(max=gw - 1)
    flat = xp.reshape(saliency, (-1,))
    base = _arange(xp, saliency.shape[0], saliency)[:, None] * (gh * gw)
    top, bottom = base + y0 * gw, base + y1 * gw
    upper = xp.take(flat, xp.reshape(top + x0, (-1,))) * xp.reshape(1 - tx, (-1,))
    upper = upper + xp.take(flat, xp.reshape(top + x1, (-1,))) * xp.reshape(tx, (-1,))
    lower = xp.take(flat, xp.reshape(bottom + x0, (-1,))) * xp.reshape(1 - tx, (-1,))
    lower = lower + xp.take(flat, xp.reshape(bottom + x1, (-1,))) * xp.reshape(tx, (-1,))
    value = xp.reshape(upper, ty.shape) * (1 - ty) + xp.reshape(lower, ty.shape) * ty
    return xp.where(inside, value, xp.zeros_like(value))


def uniform_centre(u: Array, first: Array, last: Array) -> Array:
    """A pixel uniform in first <= (i, j) <= last. u: float64 [B, 2] in (0, 1) -> int64 [B, 2]."""
    xp = array_namespace(u)
    return first + xp.astype(xp.floor(u * (last - first + 1)), xp.int64)


def draw_centre(
    u: Array,
    saliency: Array,
    lam: Array,
    window: Array,
    size_px: Array,
    first: Array,
    last: Array,
    *,
    lam_bound: float,
) -> Array:
    """Eq. 4: a pixel (i, j) with P(i, j) ∝ exp(λ·Â(i, j)) over first <= (i, j) <= last.

    u: float64 [B, DRAWS] in (0, 1). saliency: float64 [B, gh, gw] over the full frame. lam: float64
    [B]. window: float64 [B, 4], the crop (y, x, h, w) as shares of the full frame. size_px: int64
    [B, 2], (H, W) of the crop. first, last: int64 [B, 2], within the crop, first <= last.
    lam_bound: the largest |λ| of the run; it sets how fine the envelope is, not what is drawn from.
    Where λ = 0 it is `uniform_centre` of the first two numbers, for any map. Returns int64 [B, 2],
    (y, x).
    """
    where = (saliency, lam, window, size_px, first, last)
    centre, drawn = _propose(u[:, :-1], *where, lam_bound)
    for k in np.flatnonzero(~_to_host(drawn)).tolist():
        centre[k] = _draw_exact(u[k, -1], *(array[k] for array in where))
    return centre


def peak(saliency: Array, window: Array, size_px: Array) -> Array:
    """The pixel of the crop where Â is largest, or one of them: int64 [B, 2], (y, x).

    saliency: float64 [B, gh, gw]. window: float64 [B, 4]. size_px: int64 [B, 2]. As in draw_centre.
    """
    xp = array_namespace(saliency)
    b, gh, gw = saliency.shape
    axis_window = _axis_window(window, size_px)
    zero, last = xp.zeros_like(size_px), size_px - 1
    # Â is bilinear on every patch, so it is largest at a corner of one.
    corners = []
    for axis, g in enumerate((gh, gw)):
        edges = _patch_edges(_nodes(g, 1), axis_window[:, axis], zero[:, axis], last[:, axis], xp)
        ends = xp.concat([edges[:, :-1], edges[:, 1:] - 1], axis=1)
        corners.append(xp.minimum(ends.clip(min=0), last[:, axis : axis + 1]))
    n, m = corners[0].shape[1], corners[1].shape[1]
    y = xp.broadcast_to(corners[0][:, :, None], (b, n, m))
    x = xp.broadcast_to(corners[1][:, None, :], (b, n, m))
    pixels = xp.reshape(xp.stack([y, x], axis=3), (b, n * m, 2))  # b may be 0
    best = xp.argmax(saliency_at(saliency, pixels, axis_window), axis=1)
    return pixels[_arange(xp, b, saliency), best]


def _propose(
    u: Array,
    saliency: Array,
    lam: Array,
    window: Array,
    size_px: Array,
    first: Array,
    last: Array,
    lam_bound: float,
) -> tuple[Array, Array]:
    """The first proposal that is accepted, int64 [B, 2], and bool [B], whether one is.

    u: float64 [B, 4 · proposals]. The others are as in draw_centre.
    """
    xp = array_namespace(saliency)
    b, gh, gw = saliency.shape
    u = xp.reshape(u, (b, u.shape[1] // 4, 4))
    axis_window = _axis_window(window, size_px)
    per_cell = max(1, math.ceil(lam_bound / _PATCH_LAMBDA))
    nodes_y, nodes_x = _nodes(gh, per_cell), _nodes(gw, per_cell)
    edge_y = _patch_edges(nodes_y, axis_window[:, 0], first[:, 0], last[:, 0], xp)
    edge_x = _patch_edges(nodes_x, axis_window[:, 1], first[:, 1], last[:, 1], xp)
    bound = _patch_bounds(saliency, lam, per_cell, xp)  # [B, py, px], of λ·Â
    count_y, count_x = edge_y[:, 1:] - edge_y[:, :-1], edge_x[:, 1:] - edge_x[:, :-1]
    # The largest bound is taken out before exp: large λ must not overflow.
    occupied = (count_y[:, :, None] > 0) & (count_x[:, None, :] > 0)
    bound = xp.where(occupied, bound, -math.inf)
    mass = xp.exp(bound - xp.max(bound, axis=(1, 2), keepdims=True)) * count_x[:, None, :]
    row = xp.cumulative_sum(xp.sum(mass, axis=2) * count_y, axis=1)  # [B, py]

    rows = _arange(xp, b, saliency)[:, None]
    target = u[:, :, 0] * row[:, -1:]  # [B, P]
    py = _count_below(row, target, xp)
    target = target - xp.where(py > 0, row[rows, (py - 1).clip(min=0)], 0.0)
    column = xp.cumulative_sum(mass[rows, py], axis=2)  # [B, P, px]
    target = target / count_y[rows, py]
    # Rounding may leave target at the row's very end: hold it below.
    target = xp.minimum(target, column[:, :, -1] * (1 - 2.0**-52))
    px = xp.sum(xp.astype(column <= target[:, :, None], xp.int64), axis=2)
    y = edge_y[rows, py] + xp.astype(xp.floor(u[:, :, 1] * count_y[rows, py]), xp.int64)
    x = edge_x[rows, px] + xp.astype(xp.floor(u[:, :, 2] * count_x[rows, px]), xp.int64)
    proposal = xp.stack([y, x], axis=2)  # [B, P, 2]
    exponent = lam[:, None] * saliency_at(saliency, proposal, axis_window)
    accepted = u[:, :, 3] <= xp.exp(exponent - bound[rows, py, px])
    chosen = proposal[rows[:, 0], xp.argmax(xp.astype(accepted, xp.int8), axis=1)]

    chosen = xp.where(lam[:, None] == 0, uniform_centre(u[:, 0, :2], first, last), chosen)
    return chosen, (lam == 0) | xp.any(accepted, axis=1)


def _axis_window(window, size_px) -> Array:
    """What saliency_at takes, of a window and size: float64 [B, axis, (start, step)]."""
    xp = array_namespace(window)
    return xp.stack([window[:, :2], window[:, 2:] / xp.astype(size_px, xp.float64)], axis=2)


def _patch_edges(nodes, axis_window, first, last, xp) -> Array:
    """First pixel of each patch along one axis, and one past the last: int64 [B, patches+1].

    Patches end at the image's borders and at the nodes of the envelope.
    """
    place = xp.asarray(np.concatenate([[0.0], nodes, [1.0]]), device=first.device)
    start, step = axis_window[:, 0:1], axis_window[:, 1:2]
    edges = xp.ceil((place[None, :] - start) / step - 0.5)
    begin, end = xp.astype(first[:, None], xp.float64), xp.astype(last[:, None] + 1, xp.float64)
    edges = xp.minimum(xp.maximum(edges, begin), end)
    return xp.astype(xp.concat([begin, edges, end], axis=1), xp.int64)


def _patch_bounds(saliency, lam, per_cell, xp) -> Array:
    """Upper bound of λ·Â on every patch, float64 [B, patches, patches]; 0 outside the image."""
    b, gh, gw = saliency.shape
    node = lam[:, None, None] * saliency
    if per_cell > 1:
        rows = xp.asarray(_refinement(gh, per_cell), device=lam.device)
        columns = xp.asarray(_refinement(gw, per_cell), device=lam.device)
        node = xp.matmul(xp.matmul(rows, node), columns.T)
    ny, nx = node.shape[1:]
    # A node bounds the patches on both its sides; the outermost ones reach to the image's border.
    bound = xp.zeros((b, ny + 3, nx + 3), dtype=node.dtype, device=lam.device)
    rows = xp.concat([node[:, :1], xp.maximum(node[:, 1:], node[:, :-1]), node[:, -1:]], axis=1)
    bound[:, 1:-1, 1] = rows[:, :, 0]
    bound[:, 1:-1, 2:-2] = xp.maximum(rows[:, :, 1:], rows[:, :, :-1])
    bound[:, 1:-1, -2] = rows[:, :, -1]
    return bound


@functools.cache
def _nodes(g: int, per_cell: int) -> np.ndarray:
    """Where the envelope's nodes lie in the full frame: the cells' centres and places between."""
    return (np.arange((g - 1) * per_cell + 1) / per_cell + 0.5) / g


@functools.cache
def _refinement(g: int, per_cell: int) -> np.ndarray:
    """Linear interpolation from the g cells to the nodes: float64 [nodes, g]."""
    place = _nodes(g, per_cell) * g - 0.5
    return np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(g)))


def _draw_exact(u, saliency, lam, window, size_px, first, last) -> Array:
    """Eq. 4 for one sample by the sum over all pixels. Returns int64 [2]."""
    xp, device = array_namespace(saliency), saliency.device
    y = xp.arange(int(first[0]), int(last[0]) + 1, dtype=xp.int64, device=device)
    x = xp.arange(int(first[1]), int(last[1]) + 1, dtype=xp.int64, device=device)
    grid = xp.stack(xp.meshgrid(y, x, indexing="ij"), axis=-1)
    pixels = xp.reshape(grid, (1, -1, 2))
    axis_window = _axis_window(window[None], size_px[None])
    exponent = lam * saliency_at(saliency[None], pixels, axis_window)[0]
    mass = xp.cumulative_sum(xp.exp(exponent - xp.max(exponent)))
    k = xp.sum(xp.astype(mass <= u * mass[-1], xp.int64))
    return pixels[0, k.clip(max=pixels.shape[1] - 1)]


def _count_below(cumulative, target, xp) -> Array:
    """Index of the first cumulative value above target. [B, n], [B, P] -> int64 [B, P]."""
    below = xp.astype(cumulative[:, None, :-1] <= target[:, :, None], xp.int64)
    return xp.sum(below, axis=2)


def _arange(xp, n, like) -> Array:
    return xp.arange(n, dtype=xp.int64, device=like.device)


def _to_host(array) -> Array:
    return array.cpu() if hasattr(array, "cpu") else array
