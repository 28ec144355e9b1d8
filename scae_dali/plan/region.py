"""Draws the rectangle to erase: its size, and its centre by eq. 4, exactly, over the crop's pixels.

Â is bilinear between the centres of the map's cells (`align_corners=False`), constant beyond the
outermost ones, and 0 outside the image. Summing exp(λ·Â) over every pixel of every crop would take
25 times as long, so the centre is drawn by rejection: over each patch of the grid on which Â is
bilinear, exp(λ·Â) is at most its value at one of the four corners, which gives an envelope of some
hundred patches. A proposal is a patch, drawn in proportion to its envelope, and a pixel uniform in
the patch. It is accepted with the probability exp(λ·Â) / envelope. Where all PROPOSALS fail, the
centre is drawn from the full sum over pixels: both branches follow eq. 4, hence so does their
mixture.

All functions take arrays, random numbers among them. Numba compiles the rejection.
"""

import functools
import math
from typing import Literal

import numpy as np

from scae_dali.plan.compiled import compiled

Range = tuple[float, float]
AspectLaw = Literal["uniform", "log"]
Border = Literal["inside", "clip"]

PROPOSALS = 6
DRAWS = 4 * PROPOSALS + 1  # uniform numbers that draw_centre takes for a sample
_PATCH_LAMBDA = 2.0  # patches are divided until |λ| times the span of Â is at most about this


def draw_size(
    u: np.ndarray, size_px: np.ndarray, area: Range, aspect: Range, law: AspectLaw = "uniform"
) -> tuple[np.ndarray, np.ndarray]:
    """Draw sizes: area a ~ U[area] of the crop, aspect r = h/w; h = √(a·HW·r), w = √(a·HW/r).

    u: float64 [B, tries, 2] in (0, 1). size_px: int64 [B, 2], (H, W). law: r ~ U[aspect], or
    log r is uniform. The first try with 1 <= h < H and 1 <= w < W counts, as in Random Erasing.
    Returns (int64 [B, 2] sizes (h, w) in pixels, bool [B] whether a try fitted; the size is 0 where
    none did).
    """
    if law == "log":
        low, high = math.log(aspect[0]), math.log(aspect[1])
        r = np.exp(low + (high - low) * u[:, :, 1])
    else:
        r = aspect[0] + (aspect[1] - aspect[0]) * u[:, :, 1]
    size, fitted = np.zeros((len(u), 2), np.int64), np.zeros(len(u), np.bool_)
    _fill_sizes(size, fitted, u[:, :, 0], r, size_px, area[0], area[1] - area[0])
    return size, fitted


@compiled
def _fill_sizes(size, fitted, u, r, size_px, area, span):
    """Writes what `draw_size` returns into size and fitted. u, r: float64 [B, tries]."""
    for i in range(len(u)):
        height, width = size_px[i]
        for k in range(u.shape[1]):
            a = (area + span * u[i, k]) * (height * width)
            h, w = np.round(np.sqrt(a * r[i, k])), np.round(np.sqrt(a / r[i, k]))
            if 1 <= h < height and 1 <= w < width:
                size[i, 0], size[i, 1], fitted[i] = h, w, True
                break


def centre_range(
    hw_px: np.ndarray, size_px: np.ndarray, border: Border
) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that may be the centre: first and last, inclusive, int64 [B, 2] each.

    The centre of a rectangle that begins at pixel y and is h high is pixel y + h // 2.
    """
    if border == "clip":
        return np.zeros_like(hw_px), size_px - 1
    return hw_px // 2, size_px - hw_px + hw_px // 2


def box_at(centre: np.ndarray, hw_px: np.ndarray, size_px: np.ndarray) -> np.ndarray:
    """The rectangle around a centre, clipped to the crop. int64 [B, 2] each -> int64 [B, 4]."""
    begin = centre - hw_px // 2
    end = np.minimum(begin + hw_px, size_px)
    begin = np.maximum(begin, 0)
    return np.concatenate([begin, end - begin], axis=1)


def saliency_at(saliency: np.ndarray, position: np.ndarray, axis_window: np.ndarray) -> np.ndarray:
    """Â at pixels of the crop.

    saliency: float64 [B, gh, gw]. position: int64 or float64 [B, N, 2], pixels (y, x). axis_window:
    float64 [B, 2, 2]: per axis, v = start + step · (pixel + ½) is the position in the full frame.
    Returns float64 [B, N].
    """
    b, gh, gw = saliency.shape
    v = axis_window[:, None, :, 0] + axis_window[:, None, :, 1] * (position + 0.5)
    inside = np.abs(v - 0.5) <= 0.5
    cells = np.array([gh, gw])
    at = np.clip(v * cells - 0.5, 0.0, cells - 1)  # the centre of cell k is at k
    low = np.floor(at).astype(np.int64)
    t = at - low
    ends = np.stack([low, np.minimum(low + 1, cells - 1)])  # [2, B, N, 2]
    # Of the four cells around each pixel: [2, 2, B, N].
    value = saliency[np.arange(b)[:, None], ends[:, None, :, :, 0], ends[None, :, :, :, 1]]
    value = value[0] + t[:, :, 0] * (value[1] - value[0])
    value = value[0] + t[:, :, 1] * (value[1] - value[0])
    return value * (inside[:, :, 0] & inside[:, :, 1])


def uniform_centre(u: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """A pixel uniform in first <= (i, j) <= last. u: float64 [B, 2] in (0, 1) -> int64 [B, 2]."""
    return first + np.floor(u * (last - first + 1)).astype(np.int64)


def draw_centre(
    u: np.ndarray,
    saliency: np.ndarray,
    lam: np.ndarray,
    window: np.ndarray,
    size_px: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    *,
    lam_bound: float,
) -> np.ndarray:
    """Eq. 4: a pixel (i, j) with P(i, j) ∝ exp(λ·Â(i, j)) over first <= (i, j) <= last.

    u: float64 [B, DRAWS] in (0, 1). saliency: float64 [B, gh, gw] over the full frame. lam: float64
    [B], |λ| <= 500. window: float64 [B, 4], the crop (y, x, h, w) as shares of the full frame.
    size_px: int64 [B, 2], (H, W) of the crop. first, last: int64 [B, 2], within the crop, first <=
    last.
    lam_bound: the largest |λ| of the run; it sets how fine the envelope is, not what is drawn from.
    Where λ = 0 it is `uniform_centre` of the first two numbers, for any map. Returns int64 [B, 2],
    (y, x).
    """
    where = (saliency, lam, window, size_px, first, last)
    centre, drawn = _propose(u[:, :-1], *where, max(1, math.ceil(lam_bound / _PATCH_LAMBDA)))
    for k in np.flatnonzero(~drawn):
        centre[k] = _draw_exact(u[k, -1], *(array[k] for array in where))
    return centre


def peak(
    saliency: np.ndarray, window: np.ndarray, size_px: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pixel of the crop where Â is largest, or one of them: int64 [B, 2], (y, x). And Â there,
    float64 [B].

    saliency: float64 [B, gh, gw], window: float64 [B, 4], size_px: int64 [B, 2]: see draw_centre.
    """
    b, *grid = saliency.shape
    axis_window = _axis_window(window, size_px)
    last = size_px - 1
    # Â is bilinear on every patch, so it is largest at a corner of one.
    corners = []
    for axis, cells in enumerate(grid):
        start, step = axis_window[:, axis : axis + 1, 0], axis_window[:, axis : axis + 1, 1]
        edges = np.ceil((_patch_ends(cells, 1) - start) / step - 0.5)
        edges = np.clip(edges, 0, size_px[:, axis : axis + 1]).astype(np.int64)
        ends = np.concatenate([edges[:, :-1], edges[:, 1:] - 1], axis=1)
        corners.append(np.clip(ends, 0, last[:, axis : axis + 1]))
    n, m = corners[0].shape[1], corners[1].shape[1]
    y = np.broadcast_to(corners[0][:, :, None], (b, n, m))
    x = np.broadcast_to(corners[1][:, None, :], (b, n, m))
    pixels = np.stack([y, x], axis=3).reshape(b, n * m, 2)  # b may be 0
    values = saliency_at(saliency, pixels, axis_window)
    best = np.arange(b), np.argmax(values, axis=1)
    return pixels[best], values[best]


def _propose(
    u: np.ndarray,
    saliency: np.ndarray,
    lam: np.ndarray,
    window: np.ndarray,
    size_px: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    per_cell: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The first proposal that is accepted, int64 [B, 2], and bool [B], whether one is.

    u: float64 [B, 4 · proposals]. per_cell: the envelope's nodes between the centres of two cells.
    The others are as in draw_centre.
    """
    _, gh, gw = saliency.shape
    centre, drawn = np.empty((len(u), 2), np.int64), np.empty(len(u), np.bool_)
    axis_window = _axis_window(window, size_px)
    ends = _patch_ends(gh, per_cell), _patch_ends(gw, per_cell)
    _fill_centres(centre, drawn, u, saliency, lam, axis_window, first, last, *ends, per_cell)
    return centre, drawn


@compiled
def _fill_centres(
    centre, drawn, u, saliency, lam, axis_window, first, last, ends_y, ends_x, per_cell
):
    """Writes what `_propose` returns into centre and drawn. Each sample takes proposals until one
    is accepted. ends_y, ends_x: see `_patch_ends`."""
    ny, nx = len(ends_y) - 1, len(ends_x) - 1  # patches
    edges_y, edges_x = np.empty(ny + 1), np.empty(nx + 1)
    node, bound = np.empty((ny - 3, nx - 3)), np.empty((ny, nx))
    above, column = np.zeros(ny + 1), np.empty(nx)
    # Maps have 256 levels, so exp(λ·Â - top) is kept for each of them as long as λ is the same.
    kept, lam_kept = np.zeros(256), np.nan
    for k in range(len(u)):
        drawn[k] = lam[k] == 0
        if drawn[k]:
            for axis in range(2):
                pixels = last[k, axis] - first[k, axis] + 1
                centre[k, axis] = first[k, axis] + np.floor(u[k, axis] * pixels)
            continue
        _fill_edges(edges_y, ends_y, axis_window[k, 0], first[k, 0], last[k, 0])
        _fill_edges(edges_x, ends_x, axis_window[k, 1], first[k, 1], last[k, 1])
        (y0, y1), (x0, x1) = _reach(edges_y), _reach(edges_x)
        # λ·Â is at most `top`. It is subtracted so that exp does not overflow.
        own, top = saliency[k], max(lam[k], 0.0)
        if lam[k] != lam_kept:
            kept[:], lam_kept = -1.0, lam[k]
        for i in range(max(y0 - 2, 0), min(y1 - 1, ny - 3)):
            for j in range(max(x0 - 2, 0), min(x1 - 1, nx - 3)):
                if per_cell == 1:
                    value = own[i, j]
                    level = np.uint8(value * 255.0 + 0.5)
                    if level / 255.0 == value:
                        if kept[level] < 0.0:
                            kept[level] = np.exp(lam[k] * value - top)
                        node[i, j] = kept[level]
                        continue
                else:
                    value = _between(own, i / per_cell, j / per_cell)
                node[i, j] = np.exp(lam[k] * value - top)
        # The upper bound of exp(λ·Â - top) on every patch; Â is 0 outside the image. A node bounds
        # the patches on both its sides; the outermost ones reach to the image's border.
        bound[:] = np.exp(-top)
        for i in range(max(y0, 1), min(y1, ny - 1)):
            low, high = max(i - 2, 0), min(i - 1, ny - 4)
            for j in range(max(x0, 1), min(x1, nx - 1)):
                left, right = max(j - 2, 0), min(j - 1, nx - 4)
                bound[i, j] = max(
                    max(node[low, left], node[high, left]), max(node[low, right], node[high, right])
                )
        for i in range(ny):
            mass = 0.0
            if edges_y[i + 1] > edges_y[i]:
                for j in range(x0, x1):
                    mass += bound[i, j] * (edges_x[j + 1] - edges_x[j])
            above[i + 1] = above[i] + mass * (edges_y[i + 1] - edges_y[i])
        for p in range(0, u.shape[1], 4):
            target = u[k, p] * above[ny]
            i = 0
            while i < ny - 1 and above[i + 1] <= target:
                i += 1
            total = 0.0
            for j in range(nx):
                total += bound[i, j] * (edges_x[j + 1] - edges_x[j])
                column[j] = total
            target = (target - above[i]) / (edges_y[i + 1] - edges_y[i])
            # Rounding may leave target at the row's very end: hold it below.
            target = min(target, total * (1 - 2.0**-52))
            j = 0
            while j < nx - 1 and column[j] <= target:
                j += 1
            y = edges_y[i] + np.floor(u[k, p + 1] * (edges_y[i + 1] - edges_y[i]))
            x = edges_x[j] + np.floor(u[k, p + 2] * (edges_x[j + 1] - edges_x[j]))
            value = _value_at(own, y, x, axis_window[k])
            if u[k, p + 3] * bound[i, j] <= np.exp(lam[k] * value - top):
                centre[k, 0], centre[k, 1], drawn[k] = y, x, True
                break


@compiled
def _reach(edges):
    """The first patch that has pixels, and one past the last. The others need no bound."""
    first, end = 0, len(edges) - 1
    while first < end and edges[first + 1] == edges[first]:
        first += 1
    while end > first and edges[end - 1] == edges[end]:
        end -= 1
    return first, end


@compiled
def _fill_edges(edges, ends, frame, first, last):
    """Writes, along one axis, the first pixel of each patch and one past the last into edges.
    frame: start and step. ends: see `_patch_ends`."""
    for i in range(len(ends)):
        edge = np.ceil((ends[i] - frame[0]) / frame[1] - 0.5)
        edges[i] = min(max(edge, float(first)), last + 1.0)


@compiled
def _value_at(saliency, y, x, axis_window):
    """`saliency_at` of one pixel."""
    gh, gw = saliency.shape
    v = axis_window[0, 0] + axis_window[0, 1] * (y + 0.5)
    w = axis_window[1, 0] + axis_window[1, 1] * (x + 0.5)
    if not (abs(v - 0.5) <= 0.5 and abs(w - 0.5) <= 0.5):
        return 0.0
    return _between(
        saliency,
        min(max(v * gh - 0.5, 0.0), gh - 1.0),
        min(max(w * gw - 0.5, 0.0), gw - 1.0),
    )


@compiled
def _between(saliency, i, j):
    """Â at (i, j) in cells: the centre of cell (k, l) is at (k, l)."""
    gh, gw = saliency.shape
    top, left = int(np.floor(i)), int(np.floor(j))
    bottom, right = min(top + 1, gh - 1), min(left + 1, gw - 1)
    a = saliency[top, left] + (i - top) * (saliency[bottom, left] - saliency[top, left])
    b = saliency[top, right] + (i - top) * (saliency[bottom, right] - saliency[top, right])
    return a + (j - left) * (b - a)


def _axis_window(window: np.ndarray, size_px: np.ndarray) -> np.ndarray:
    """The axis_window of `saliency_at` for a window and a size: float64 [B, 2, (start, step)]."""
    return np.stack([window[:, :2], window[:, 2:] / size_px], axis=2)


@functools.cache
def _patch_ends(cells: int, per_cell: int) -> np.ndarray:
    """Where patches may end along one axis of the full frame, float64 [n]: at the image's borders
    and at the nodes of the envelope, which are the cells' centres and positions between."""
    nodes = (np.arange((cells - 1) * per_cell + 1) / per_cell + 0.5) / cells
    return np.array([-np.inf, 0.0, *nodes, 1.0, np.inf])


def _draw_exact(u, saliency, lam, window, size_px, first, last) -> np.ndarray:
    """Eq. 4 for one sample by the sum over all pixels. Returns int64 [2]."""
    (start_y, step_y), (start_x, step_x) = _axis_window(window[None], size_px[None])[0]
    y, x = (np.arange(first[axis], last[axis] + 1) for axis in (0, 1))
    rows = _cell_weights(start_y + step_y * (y + 0.5), saliency.shape[0])
    columns = _cell_weights(start_x + step_x * (x + 0.5), saliency.shape[1])
    exponent = lam * (rows @ saliency @ columns.T)
    mass = np.exp(exponent - exponent.max())
    row = np.cumulative_sum(mass.sum(axis=1), include_initial=True)
    target = u * row[-1]
    i = np.count_nonzero(row[1:-1] <= target)
    column = np.cumsum(mass[i])
    j = np.count_nonzero(column[:-1] <= target - row[i])
    return np.array([y[i], x[j]])


def _cell_weights(v: np.ndarray, cells: int) -> np.ndarray:
    """Along one axis, the weight of each cell at positions of the full frame; 0 outside the image.
    float64 [n] -> float64 [n, cells].
    """
    at = np.clip(v * cells - 0.5, 0.0, cells - 1.0)
    weight = np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0.0)
    return weight * (np.abs(v - 0.5) <= 0.5)[:, None]
