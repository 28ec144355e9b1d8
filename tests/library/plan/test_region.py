"""Eq. 4 and the rectangle: exact distributions, by brute force over the pixels."""

import numpy as np
import pytest
from plans import brute_saliency, saliency_map
from scipy import stats

from scae_dali.plan import region
from scae_dali.plan.random import Stream, uniforms

H = W = 32
DRAWS = 20_000


def draw(saliency, lam, window, hw, border, n=DRAWS, chunk=1000, size=(H, W), draws=region.DRAWS):
    """Centres for n ids, in batches: int64 [n, 2]."""
    out = []
    for start in range(0, n, chunk):
        ids = np.arange(start, min(start + chunk, n))
        b = len(ids)
        size_px = np.tile(np.array(size), (b, 1))
        first, last = region.centre_range(np.tile(np.array(hw), (b, 1)), size_px, border)
        arrays = [
            np.tile(saliency, (b, 1, 1)),
            np.full(b, float(lam)),
            np.tile(np.array(window, float), (b, 1)),
            size_px,
            first,
            last,
        ]
        u = uniforms(3, Stream.CENTRE, 5, ids, draws)
        out.append(region.draw_centre(u, *arrays, lam_bound=abs(lam)))
    return np.concatenate(out)


def expected(saliency, lam, window, hw, border):
    a = brute_saliency(saliency, window, H, W)
    p = np.exp(lam * (a - a.max() if lam > 0 else a - a.min()))
    if border == "inside":
        valid = np.zeros((H, W), bool)
        valid[hw[0] // 2 : H - hw[0] + hw[0] // 2 + 1, hw[1] // 2 : W - hw[1] + hw[1] // 2 + 1] = 1
        p = np.where(valid, p, 0.0)
    return p / p.sum()


def chi_square(centres, p):
    """p-value over blocks of 2x2 pixels, those of small expectation pooled.

    Pixels that cannot be a centre must stay empty.
    """
    counts = np.zeros((H, W))
    np.add.at(counts, (centres[:, 0], centres[:, 1]), 1)
    assert counts[p == 0].sum() == 0
    blocks = (H // 2, 2, W // 2, 2)
    counts, p = counts.reshape(blocks).sum((1, 3)), p.reshape(blocks).sum((1, 3))
    e = p.ravel() * len(centres)
    large = e >= 5
    observed = np.append(counts.ravel()[large], counts.ravel()[~large].sum())
    wanted = np.append(e[large], e[~large].sum())
    keep = wanted > 1e-9
    return stats.chisquare(observed[keep], wanted[keep]).pvalue


WINDOWS = [
    (0.0, 0.0, 1.0, 1.0),
    (0.21, 0.4, 0.37, 0.11),
    (0.5, 0.02, 0.5, 0.9),
    (-0.1, 0.6, 0.8, 0.6),
]


@pytest.mark.parametrize("border", ["inside", "clip"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lam", [-20.0, -2.0, 0.0, 0.7, 2.0, 5.0, 20.0])
def test_centres_follow_eq_4(lam, window, border):
    a, hw = saliency_map(), (9, 12)
    p = chi_square(draw(a, lam, window, hw, border), expected(a, lam, window, hw, border))
    assert p > 1e-4


def test_the_chi_square_test_can_fail():
    a, hw, window = saliency_map(), (9, 12), WINDOWS[0]
    centres = draw(a, 2.0, window, hw, "inside")
    assert chi_square(centres, expected(a, 1.4, window, hw, "inside")) < 1e-4
    shifted = (1.5 / H, *window[1:])  # one and a half pixels off
    assert chi_square(centres, expected(a, 2.0, shifted, hw, "inside")) < 1e-4


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (8, 8), (14, 14)])
def test_any_grid(grid):
    a = saliency_map(grid=grid) if grid != (1, 1) else np.ones(grid)
    window = (0.1, -0.2, 0.8, 1.3)
    centres = draw(a, 3.0, window, (5, 5), "clip")
    assert chi_square(centres, expected(a, 3.0, window, (5, 5), "clip")) > 1e-4


def test_failed_proposals_fall_back_to_the_exact_sum(monkeypatch):
    """With one proposal a draw, most centres come from the full sum; the law stays the same."""
    monkeypatch.setattr(region, "_PATCH_LAMBDA", 1e9)
    a, window = saliency_map(1), WINDOWS[0]
    centres = draw(a, 6.0, window, (3, 3), "inside", n=8000, draws=5)
    assert chi_square(centres, expected(a, 6.0, window, (3, 3), "inside")) > 1e-4


def proposed_by_hand(u, saliency, lam, window, size, first, last, per_cell):
    """The first accepted proposal of one sample, (y, x), or None: array by array, not compiled."""
    u = u.reshape(-1, 4)
    if lam == 0:
        return tuple((first + np.floor(u[0, :2] * (last - first + 1))).astype(int).tolist())
    step, edges, weights = window[2:] / size, [], []
    for axis, cells in enumerate(saliency.shape):
        nodes = (np.arange((cells - 1) * per_cell + 1) / per_cell + 0.5) / cells
        ends = np.concatenate([[-np.inf, 0.0], nodes, [1.0, np.inf]])
        pixels = np.ceil((ends - window[axis]) / step[axis] - 0.5)
        edges.append(np.clip(pixels, first[axis], last[axis] + 1))
        place = nodes * cells - 0.5
        weights.append(np.maximum(1 - np.abs(place[:, None] - np.arange(cells)), 0))
    top = max(lam, 0.0)
    node = np.pad(np.exp(lam * (weights[0] @ saliency @ weights[1].T) - top), 1, mode="edge")
    rows = np.maximum(node[1:], node[:-1])
    bound = np.full([len(edge) - 1 for edge in edges], np.exp(-top))
    bound[1:-1, 1:-1] = np.maximum(rows[:, 1:], rows[:, :-1])
    count_y, count_x = map(np.diff, edges)
    above = np.concatenate([[0.0], np.cumsum(bound @ count_x * count_y)])
    for one in u:
        i = np.searchsorted(above[1:-1], one[0] * above[-1], side="right")
        column = np.cumsum(bound[i] * count_x)
        target = min((one[0] * above[-1] - above[i]) / count_y[i], column[-1] * (1 - 2.0**-52))
        j = np.searchsorted(column[:-1], target, side="right")
        y, x = (
            edge[k] + np.floor(v * (edge[k + 1] - edge[k]))
            for edge, k, v in zip(edges, (i, j), one[1:3], strict=True)
        )
        axis_window = np.stack([window[:2], step], axis=1)[None]
        value = region.saliency_at(saliency[None], np.array([[[y, x]]]), axis_window)[0, 0]
        if one[3] * bound[i, j] <= np.exp(lam * value - top):
            return int(y), int(x)
    return None


@pytest.mark.parametrize("per_cell", [1, 3, 10])
@pytest.mark.parametrize("border", ["inside", "clip"])
def test_the_proposals_are_accepted_that_the_envelope_says(border, per_cell):
    rng, n = np.random.default_rng(per_cell), 1500
    maps = rng.integers(0, 256, (n, 5, 8)) / 255
    lam = rng.uniform(-2.0, 2.0, n) * per_cell * (rng.random(n) < 0.9)
    share = rng.uniform(0.05, 1.0, (n, 2))
    window = np.hstack([rng.uniform(-0.1, 1.0, (n, 2)) * (1 - share), share])
    size_px = rng.integers(8, 200, (n, 2))
    first, last = region.centre_range(rng.integers(1, size_px), size_px, border)
    u = uniforms(1, Stream.CENTRE, 0, np.arange(n), region.DRAWS)[:, :-1]
    where = u, maps, lam, window, size_px, first, last
    centre, drawn = region._propose(*where, per_cell)
    assert 0.8 < drawn.mean() < 1
    others = [proposed_by_hand(*(part[k] for part in where), per_cell) for k in range(n)]
    assert drawn.tolist() == [other is not None for other in others]
    assert [tuple(c) for c in centre[drawn].tolist()] == [other for other in others if other]


def test_a_draw_does_not_depend_on_the_batch():
    a = saliency_map(4)
    whole = draw(a, 2.0, WINDOWS[2], (9, 12), "inside", n=500, chunk=500)
    parts = draw(a, 2.0, WINDOWS[2], (9, 12), "inside", n=500, chunk=7)
    np.testing.assert_array_equal(whole, parts)


def test_saliency_at_is_bilinear_and_zero_outside():
    a = saliency_map(5)
    for window in WINDOWS:
        grid = np.stack(np.meshgrid(np.arange(H), np.arange(W), indexing="ij"), -1).reshape(
            1, -1, 2
        )
        axis_window = np.array([[[window[0], window[2] / H], [window[1], window[3] / W]]])
        mine = region.saliency_at(a[None], grid, axis_window).reshape(H, W)
        np.testing.assert_allclose(mine, brute_saliency(a, window, H, W), atol=1e-12)


def test_sizes_follow_area_and_aspect_and_fit():
    n = 50_000
    u = uniforms(0, Stream.ERASE, 0, np.arange(n), 20).reshape(n, 10, 2)
    size_px = np.full((n, 2), 224)
    hw, fitted = region.draw_size(u, size_px, (0.02, 0.33), (0.3, 3.3))
    assert fitted.all()
    assert ((hw >= 1) & (hw < 224)).all()
    area, aspect = hw.prod(1) / 224**2, hw[:, 0] / hw[:, 1]
    assert stats.kstest(area, stats.uniform(0.02, 0.31).cdf).statistic < 0.01
    assert (aspect > 1).mean() == pytest.approx((3.3 - 1) / 3.0, abs=0.01)


def test_a_rectangle_that_never_fits_is_no_rectangle():
    u = np.full((3, 10, 2), 0.999)
    hw, fitted = region.draw_size(u, np.array([[1, 1], [4, 300], [2, 2]]), (0.3, 0.33), (3.0, 3.3))
    assert fitted.tolist() == [False, False, False]
    assert hw.tolist() == [[0, 0]] * 3


def random_erasing_oracle(n, seed, h, w):
    """Random Erasing as published, from the standard library alone: (y, x, h, w) or None."""
    import random

    rnd, boxes = random.Random(seed), []
    for _ in range(n):
        for _ in range(10):
            target = rnd.uniform(0.02, 0.33) * h * w
            ratio = rnd.uniform(0.3, 3.3)
            eh, ew = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
            if eh < h and ew < w:
                boxes.append((rnd.randint(0, h - eh), rnd.randint(0, w - ew), eh, ew))
                break
    return np.array(boxes)


def test_at_lambda_0_the_boxes_are_those_of_random_erasing():
    n, size = 20_000, 64
    ids = np.arange(n)
    u = uniforms(1, Stream.ERASE, 0, ids, 20).reshape(n, 10, 2)
    size_px = np.full((n, 2), size)
    hw, _ = region.draw_size(u, size_px, (0.02, 0.33), (0.3, 3.3))
    first, last = region.centre_range(hw, size_px, "inside")
    centre = region.draw_centre(
        uniforms(1, Stream.CENTRE, 0, ids, region.DRAWS),
        np.tile(saliency_map(), (n, 1, 1)),
        np.zeros(n),
        np.tile(np.array([WINDOWS[1]]), (n, 1)),
        size_px,
        first,
        last,
        lam_bound=0.0,
    )
    mine = region.box_at(centre, hw, size_px)
    other = random_erasing_oracle(n, 0, size, size)
    assert (mine[:, :2] >= 0).all()
    assert (mine[:, :2] + mine[:, 2:] <= size).all()
    for quantity in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2],
        lambda b: b[:, 0] * size + b[:, 1],
        lambda b: b[:, 0] / (size - b[:, 2]),
        lambda b: b[:, 1] / (size - b[:, 3]) + b[:, 2],
    ):
        assert stats.ks_2samp(quantity(mine), quantity(other)).pvalue > 1e-4


def test_clip_keeps_the_centre_and_cuts_the_rectangle():
    centre, hw = np.array([[0, 31], [16, 16]]), np.array([[10, 8], [10, 8]])
    box = region.box_at(centre, hw, np.array([[32, 32], [32, 32]]))
    assert box.tolist() == [[0, 27, 5, 5], [11, 12, 10, 8]]
