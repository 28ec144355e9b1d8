"""Which rectangle to erase: its size, and its centre by eq. 4, exactly, over the crop's pixels.

Â is bilinear between the centres of the map's cells (`align_corners=False`), constant beyond the
outermost ones, and 0 outside the image. Summing exp(λ·Â) over every pixel of every crop would take
25 times as long, so the centre is drawn by rejection: over each patch of the grid on which Â is
bilinear, exp(λ·Â) is at most its value at one of the four corners, which gives an envelope of some
hundred patches. A proposal is a patch in proportion to its envelope, a pixel uniform in it,
and is accepted with exp(λ·Â) over the envelope. Where all PROPOSALS fail, the centre is drawn from
the full sum over pixels: both branches follow eq. 4, hence so does their mixture.

Functions of arrays (NumPy or torch); random numbers are given. Of NumPy's arrays the rejection is
compiled by Numba.
"""

import functools
import math

import numpy as np

from scae_dali.config import AspectLaw, Border, Range
from scae_dali.plan.random import Array, array_namespace, compiled, on_host

PROPOSALS = 6
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

    saliency: float64 [B, gh, gw]. position: int64 or float64 [B, N, 2], pixels (y, x). axis_window:
    float64 [B, 2, 2]: per axis, v = start + step · (pixel + ½) is the place in the full frame.
    Returns float64 [B, N].
    """
    xp = array_namespace(saliency)
    b, gh, gw = saliency.shape
    v = axis_window[:, None, :, 0] + axis_window[:, None, :, 1] * (position + 0.5)
    inside = xp.abs(v - 0.5) <= 0.5
    grid = xp.asarray(saliency.shape[1:], dtype=xp.float64, device=saliency.device)
    place = xp.minimum((v * grid - 0.5).clip(min=0.0), grid - 1)  # the centre of cell k is at k
    low = xp.floor(place)
    t = place - low
    ends = xp.stack([low, xp.minimum(low + 1, grid - 1)])  # [2, B, N, 2]
    base = gh * gw * _arange(xp, b, saliency)[:, None]
    corner = (ends[:, None, :, :, 0] * gw + ends[None, :, :, :, 1]) + base  # [2, 2, B, N]
    value = _pick(saliency, xp.astype(corner, xp.int64))
    value = value[0] + t[:, :, 0] * (value[1] - value[0])
    value = value[0] + t[:, :, 1] * (value[1] - value[0])
    return value * (inside[:, :, 0] & inside[:, :, 1])


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
    [B], |λ| <= 500. window: float64 [B, 4], the crop (y, x, h, w) as shares of the full frame.
    size_px: int64 [B, 2], (H, W) of the crop. first, last: int64 [B, 2], within the crop, first <=
    last.
    lam_bound: the largest |λ| of the run; it sets how fine the envelope is, not what is drawn from.
    Where λ = 0 it is `uniform_centre` of the first two numbers, for any map. Returns int64 [B, 2],
    (y, x).
    """
    where = (saliency, lam, window, size_px, first, last)
    propose = _propose_by_turns if isinstance(saliency, np.ndarray) else _propose
    centre, drawn = propose(u[:, :-1], *where, max(1, math.ceil(lam_bound / _PATCH_LAMBDA)))
    for k in np.flatnonzero(~on_host(drawn)).tolist():
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
    edges = xp.astype(_patch_edges((gh, gw), 1, axis_window, zero, last), xp.int64)
    corners = []
    along_y = gh + 4  # one more than there are patches
    for axis, edge in enumerate((edges[:, :along_y], edges[:, along_y:])):
        ends = xp.concat([edge[:, :-1], edge[:, 1:] - 1], axis=1)
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
    per_cell: int,
) -> tuple[Array, Array]:
    """The first proposal that is accepted, int64 [B, 2], and bool [B], whether one is.

    u: float64 [B, 4 · proposals]. per_cell: the envelope's nodes between the centres of two cells.
    The others are as in draw_centre.
    """
    xp = array_namespace(saliency)
    b, grid = saliency.shape[0], saliency.shape[1:]
    u = xp.reshape(u, (b, u.shape[1] // 4, 4))
    axis_window = _axis_window(window, size_px)
    edges = _patch_edges(grid, per_cell, axis_window, first, last)
    top = lam.clip(min=0.0)  # λ·Â is at most this; taken out before exp, which must not overflow
    bound = _patch_bounds(saliency, lam, top, per_cell)  # [B, ny, nx]
    _, ny, nx = bound.shape
    count = edges[:, 1:] - edges[:, :-1]  # between the two axes it is of nothing
    count_y, count_x = count[:, :ny], count[:, ny + 1 :]
    mass = xp.matmul(bound, count_x[:, :, None])[:, :, 0] * count_y
    above = xp.cumulative_sum(mass, axis=1, include_initial=True)  # [B, ny + 1]

    rows = _arange(xp, b, saliency)[:, None]
    target = u[:, :, 0] * above[:, -1:]  # [B, P]
    py = _count_below(above[:, None, 1:-1], target)
    row = rows * ny + py
    column = xp.take(xp.reshape(bound, (b * ny, nx)), xp.reshape(row, (-1,)), axis=0)
    column = xp.cumulative_sum(xp.reshape(column, (b, -1, nx)) * count_x[:, None, :], axis=2)
    target = (target - _pick(above, row + rows)) / _pick(count_y, row)
    # Rounding may leave target at the row's very end: hold it below.
    target = xp.minimum(target, column[:, :, -1] * (1 - 2.0**-52))
    px = _count_below(column[:, :, :-1], target)
    patch = xp.stack([py, px + ny + 1], axis=2) + rows[:, :, None] * edges.shape[1]
    begin, end = _pick(edges, patch), _pick(edges, patch + 1)
    proposal = begin + xp.floor(u[:, :, 1:3] * (end - begin))  # [B, P, 2]
    exponent = lam[:, None] * saliency_at(saliency, proposal, axis_window) - top[:, None]
    accepted = u[:, :, 3] * _pick(bound, row * nx + px) <= xp.exp(exponent)
    first_one = xp.argmax(xp.astype(accepted, xp.int8), axis=1)
    chosen = xp.astype(proposal[rows[:, 0], first_one], xp.int64)

    chosen = xp.where(lam[:, None] == 0, uniform_centre(u[:, 0, :2], first, last), chosen)
    return chosen, (lam == 0) | xp.any(accepted, axis=1)


def _propose_by_turns(u, saliency, lam, window, size_px, first, last, per_cell):
    """`_propose` of NumPy's arrays: a sample after the other, with the proposals that it takes."""
    places, axis = _places(*saliency.shape[1:], per_cell)
    centre, drawn = np.empty((len(u), 2), np.int64), np.empty(len(u), np.bool_)
    axis_window = _axis_window(window, size_px)
    by_axis = places[axis == 0], places[axis == 1]
    _fill_centres(centre, drawn, u, saliency, lam, axis_window, first, last, *by_axis, per_cell)
    return centre, drawn


@compiled
def _fill_centres(
    centre, drawn, u, saliency, lam, axis_window, first, last, places_y, places_x, per_cell
):
    ny, nx = len(places_y) - 1, len(places_x) - 1  # patches
    edges_y, edges_x = np.empty(ny + 1), np.empty(nx + 1)
    node, bound = np.empty((ny - 3, nx - 3)), np.empty((ny, nx))
    above, column = np.zeros(ny + 1), np.empty(nx)
    for k in range(len(u)):
        drawn[k] = lam[k] == 0
        if drawn[k]:
            for axis in range(2):
                pixels = last[k, axis] - first[k, axis] + 1
                centre[k, axis] = first[k, axis] + np.floor(u[k, axis] * pixels)
            continue
        _fill_edges(edges_y, places_y, axis_window[k, 0], first[k, 0], last[k, 0])
        _fill_edges(edges_x, places_x, axis_window[k, 1], first[k, 1], last[k, 1])
        (y0, y1), (x0, x1) = _reach(edges_y), _reach(edges_x)
        own, top = saliency[k], max(lam[k], 0.0)
        for i in range(max(y0 - 2, 0), min(y1 - 1, ny - 3)):
            for j in range(max(x0 - 2, 0), min(x1 - 1, nx - 3)):
                value = own[i, j] if per_cell == 1 else _between(own, i / per_cell, j / per_cell)
                node[i, j] = np.exp(lam[k] * value - top)
        bound[:] = np.exp(-top)  # as in _patch_bounds
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
    """The first patch that has pixels, and one past the last: what is beyond need not be known."""
    first, end = 0, len(edges) - 1
    while first < end and edges[first + 1] == edges[first]:
        first += 1
    while end > first and edges[end - 1] == edges[end]:
        end -= 1
    return first, end


@compiled
def _fill_edges(edges, places, frame, first, last):
    """`_patch_edges` of one axis. frame: start and step."""
    for i in range(len(places)):
        edge = np.ceil((places[i] - frame[0]) / frame[1] - 0.5)
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
    """Â where the centre of cell (k, l) is at (k, l)."""
    gh, gw = saliency.shape
    top, left = int(np.floor(i)), int(np.floor(j))
    bottom, right = min(top + 1, gh - 1), min(left + 1, gw - 1)
    a = saliency[top, left] + (i - top) * (saliency[bottom, left] - saliency[top, left])
    b = saliency[top, right] + (i - top) * (saliency[bottom, right] - saliency[top, right])
    return a + (j - left) * (b - a)


def _axis_window(window, size_px) -> Array:
    """What saliency_at takes, of a window and size: float64 [B, axis, (start, step)]."""
    xp = array_namespace(window)
    return xp.stack([window[:, :2], window[:, 2:] / xp.astype(size_px, xp.float64)], axis=2)


def _patch_edges(grid, per_cell, axis_window, first, last) -> Array:
    """First pixel of each patch along y, and one past the last; then those along x: float64
    [B, ny + 1 + nx + 1], whole numbers.

    Patches end at the image's borders and at the nodes of the envelope.
    """
    xp, device = array_namespace(first), first.device
    place, axis = (xp.asarray(array, device=device) for array in _places(*grid, per_cell))
    frame = xp.take(axis_window, axis, axis=1)
    begin, end = (xp.take(array, axis, axis=1) for array in (first, last + 1))
    edges = xp.ceil((place - frame[:, :, 0]) / frame[:, :, 1] - 0.5)
    return xp.minimum(xp.maximum(edges, begin), end)


def _patch_bounds(saliency, lam, top, per_cell) -> Array:
    """Upper bound of exp(λ·Â - top) on every patch, float64 [B, ny, nx]."""
    xp = array_namespace(saliency)
    b, gh, gw = saliency.shape
    node = saliency
    if per_cell > 1:
        rows = xp.asarray(_refinement(gh, per_cell), device=lam.device)
        columns = xp.asarray(_refinement(gw, per_cell), device=lam.device)
        node = xp.matmul(xp.matmul(rows, node), columns.T)
    node = xp.exp(lam[:, None, None] * node - top[:, None, None])
    # A node bounds the patches on both its sides; the outermost ones reach to the image's border.
    bound = xp.empty((b, node.shape[1] + 3, node.shape[2] + 3), dtype=node.dtype, device=lam.device)
    bound[...] = xp.exp(-top)[:, None, None]  # Â is 0 outside the image
    rows = xp.concat([node[:, :1], xp.maximum(node[:, 1:], node[:, :-1]), node[:, -1:]], axis=1)
    bound[:, 1:-1, 1] = rows[:, :, 0]
    bound[:, 1:-1, 2:-2] = xp.maximum(rows[:, :, 1:], rows[:, :, :-1])
    bound[:, 1:-1, -2] = rows[:, :, -1]
    return bound


@functools.cache
def _places(gh: int, gw: int, per_cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Where patches may end in the full frame, along y and then along x: float64 and int64 [n],
    the place and the axis."""
    along = [[-np.inf, 0.0, *_nodes(g, per_cell), 1.0, np.inf] for g in (gh, gw)]
    return np.concatenate(along), np.repeat([0, 1], [len(places) for places in along])


@functools.cache
def _nodes(g: int, per_cell: int) -> np.ndarray:
    """Where the envelope's nodes lie in the full frame: the cells' centres and places between."""
    return (np.arange((g - 1) * per_cell + 1) / per_cell + 0.5) / g


@functools.cache
def _refinement(g: int, per_cell: int) -> np.ndarray:
    """Linear interpolation from the g cells to the nodes: float64 [nodes, g]."""
    return _cell_weights(_nodes(g, per_cell), g)


def _draw_exact(u, saliency, lam, window, size_px, first, last) -> Array:
    """Eq. 4 for one sample by the sum over all pixels. Returns int64 [2]."""
    xp, device = array_namespace(saliency), saliency.device
    (start_y, step_y), (start_x, step_x) = _axis_window(window[None], size_px[None])[0]
    y = xp.arange(int(first[0]), int(last[0]) + 1, dtype=xp.int64, device=device)
    x = xp.arange(int(first[1]), int(last[1]) + 1, dtype=xp.int64, device=device)
    rows = _cell_weights(start_y + step_y * (y + 0.5), saliency.shape[0])
    columns = _cell_weights(start_x + step_x * (x + 0.5), saliency.shape[1])
    exponent = lam * xp.matmul(xp.matmul(rows, saliency), columns.T)
    mass = xp.exp(exponent - xp.max(exponent))
    row = xp.cumulative_sum(xp.sum(mass, axis=1), include_initial=True)
    target = u * row[-1]
    i = int(xp.sum(xp.astype(row[1:-1] <= target, xp.int64)))
    column = xp.cumulative_sum(mass[i])
    j = int(xp.sum(xp.astype(column[:-1] <= target - row[i], xp.int64)))
    return xp.stack([y[i], x[j]])


def _cell_weights(v, cells) -> Array:
    """Along one axis, the weight of each cell at places of the full frame; 0 outside the image.
    float64 [n] -> float64 [n, cells].
    """
    xp = array_namespace(v)
    place = (v * cells - 0.5).clip(0.0, cells - 1.0)
    cell = xp.arange(cells, dtype=xp.float64, device=v.device)
    weight = (1 - xp.abs(place[:, None] - cell)).clip(min=0.0)
    return weight * (xp.abs(v - 0.5) <= 0.5)[:, None]


def _count_below(cumulative, target) -> Array:
    """How many cumulative values are not above target. [B, 1 or P, n], [B, P] -> int64 [B, P].

    A product with ones, for a sum along a short axis takes several times as long.
    """
    xp = array_namespace(target)
    below = xp.astype(cumulative <= target[:, :, None], xp.float64)
    ones = xp.ones((below.shape[2],), dtype=xp.float64, device=target.device)
    return xp.astype(xp.matmul(below, ones), xp.int64)


def _pick(array, index) -> Array:
    """Elements by their place in the flattened array: of the shape of index."""
    xp = array_namespace(array)
    flat = xp.take(xp.reshape(array, (-1,)), xp.reshape(index, (-1,)))
    return xp.reshape(flat, index.shape)


def _arange(xp, n, like) -> Array:
    return xp.arange(n, dtype=xp.int64, device=like.device)
