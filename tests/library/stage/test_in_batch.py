"""Plans whose partners are of the batch, because those of the whole data set cannot be read."""

import numpy as np
import pytest

from scae_dali.data.index import ImageIndex
from scae_dali.methods import Run, Status, compose
from scae_dali.stage.stage import Stage
from scae_dali.stage.table import Planner

BATCH, SIZE = 16, (64, 64)
ALWAYS = {"skip_first": 0, "skip_last": 0}
COUNTS = (100, 40, 6, 2)  # of the tail, with tail=0.1, are the last two
INDEX = ImageIndex.from_arrays(
    [f"{i}.jpg" for i in range(148)], np.repeat(np.arange(4), COUNTS), root="/nowhere"
)


def planner(method="scae", size=BATCH, cache=None, **settings):
    one = Stage(INDEX, method, epochs=8, batch_size=size, seed=3, cache=cache, **settings)
    return one.planner(in_batch=True)


def batches(n, size=BATCH):
    """Ids of n batches, half of them of the tail."""
    rng = np.random.default_rng(5)
    head, tail = rng.integers(0, 140, (n, size // 2)), rng.integers(140, 148, (n, size - size // 2))
    return np.concatenate([head, tail], axis=1)


def rows_of(plan, ids, first=0):
    """The table of these batches, int64 [n, B] of ids: float64 [n, B, K]."""
    n, size = ids.shape
    number = first + np.arange(n * size) // size
    table = plan(ids.ravel(), number, np.tile(SIZE, (n * size, 1)))
    return table.reshape(n, size, -1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("scae", {}),
        ("cmo", {"prob": 0.6, "per": "sample", "skip_first": 0}),
        ("trivial_augment+cmo", {"cmo": {"prob": 0.6, "skip_first": 0}}),
        ("rand_augment+scae", {}),
    ],
)
def test_partners_are_others_of_the_batch_and_labels_are_theirs(method, settings):
    plan, ids = planner(method, **settings), batches(12)
    table = rows_of(plan, ids)
    part = {name: table[..., plan.columns[name].start].astype(int) for name in plan.columns}
    mixed = part["status"] & int(Status.MIXED_IN_BATCH) > 0
    assert 0.1 < mixed.mean() < 0.9
    assert not (part["status"] & int(Status.MIXED)).any()
    own = np.tile(np.arange(BATCH), (12, 1))
    assert (part["source"][mixed] != own[mixed]).all()
    assert (part["source"][~mixed] == own[~mixed]).all()
    partner = np.take_along_axis(ids, part["source"], axis=1)
    assert (part["partner_id"] == partner).all()
    assert (part["partner"] == INDEX.labels[partner]).all()
    assert (part["label"] == INDEX.labels[ids]).all()
    mu = table[..., plan.columns["mu"].start]
    assert (mu[~mixed] == 1).all()
    assert (mu[mixed] < 1).any()


def test_a_plan_of_several_batches_is_that_of_each():
    plan, ids = planner(), batches(5)
    whole = rows_of(plan, ids)
    for k in range(5):
        np.testing.assert_array_equal(rows_of(plan, ids[k : k + 1], first=k)[0], whole[k])
    other = rows_of(plan, ids[:1, ::-1])[0]  # the partner hangs on what else is in the batch
    assert (other[::-1, plan.columns["mu"].start] == whole[0][:, plan.columns["mu"].start]).all()


def test_the_batch_may_be_of_one_image():
    plan = planner(size=1)
    table = rows_of(plan, np.arange(140, 148)[:, None])[:, 0]
    status = table[:, plan.columns["status"].start].astype(int)
    assert (status & int(Status.MIXED_IN_BATCH)).any()
    for name, wanted in {"id": "partner_id", "label": "partner"}.items():
        mine, yours = (table[:, plan.columns[one].start] for one in (name, wanted))
        assert (mine == yours).all()


def test_scae_takes_the_own_class_or_a_neighbouring_one_if_the_batch_has_it():
    near = np.array([[1], [0], [1], [2]])  # of class 2 it is class 1
    run = Run(
        seed=3, epochs=8, labels=INDEX.labels, class_counts=np.array(COUNTS), neighbors=lambda: near
    )
    method = compose.make(compose.configs("scae", {}), run)
    settings = {"batch_size": BATCH, "batches_per_epoch": 10}
    plan, ids = Planner(INDEX, method, run, **settings, in_batch=True), batches(40)
    table = rows_of(plan, ids)
    mixed = table[..., plan.columns["status"].start].astype(int) == Status.MIXED_IN_BATCH
    seen = set()
    for batch, k in zip(*np.nonzero(mixed), strict=True):
        label, partner = (int(table[batch, k, plan.columns[c].start]) for c in ("label", "partner"))
        present = INDEX.labels[np.delete(ids[batch], k)]
        wanted = {label, *near[label].tolist()}
        if wanted & set(present.tolist()):
            assert partner in wanted
        seen.add((label, partner))
    assert {(2, 1), (2, 2), (3, 2)} <= seen


def test_cmo_takes_all_classes_about_equally_often():
    plan = planner("cmo", size=148, prob=1.0, per="sample", **ALWAYS)
    ids = np.array([np.random.default_rng(k).permutation(148) for k in range(20)])
    table = rows_of(plan, ids)
    partner = table[..., plan.columns["partner"].start].astype(int)
    shares = np.bincount(partner.ravel(), minlength=4) / partner.size
    np.testing.assert_allclose(shares, 0.25, atol=0.03)
    alike = planner("cmo", size=148, prob=1.0, per="sample", **ALWAYS, weight_power=0.0)
    partner = rows_of(alike, ids)[..., alike.columns["partner"].start].astype(int)
    shares = np.bincount(partner.ravel(), minlength=4) / partner.size
    np.testing.assert_allclose(shares, np.array(COUNTS) / 148, atol=0.03)


def test_the_guided_box_of_cmo_lies_where_the_partner_in_the_batch_is_salient():
    """Each map has one bright cell; the whole image is seen, and nothing is flipped."""
    cells = np.random.default_rng(7).integers(1, 6, (148, 2))

    def maps(ids):
        found = np.zeros((len(ids), 7, 7), np.uint8)
        found[np.arange(len(ids)), cells[ids, 0], cells[ids, 1]] = 255
        return found, np.ones(len(ids), bool)

    run = Run(seed=3, epochs=8, labels=INDEX.labels, class_counts=np.array(COUNTS), saliency=maps)
    method = compose.make(compose.configs("cmo", {"prob": 1.0, "saliency": True, **ALWAYS}), run)
    settings = {"batch_size": BATCH, "batches_per_epoch": 10}
    plan = Planner(INDEX, method, run, **settings, in_batch=True)
    table = rows_of(plan, batches(4)).reshape(4 * BATCH, -1)
    partner = table[:, plan.columns["partner_id"].start].astype(int)
    anchor = table[:, plan.columns["paste_anchors"]][:, 2:]
    shape = table[:, plan.columns["paste_shapes"]][:, 2:]
    pasted = (shape > 0).all(axis=1)
    assert pasted.sum() > 40
    peak = (cells[partner] + 0.5) * 64 / 7
    inside = (anchor <= peak) & (peak <= anchor + shape)
    assert inside[pasted & (shape > 4).all(axis=1)].all()
    mu = table[:, plan.columns["mu"].start]
    np.testing.assert_allclose(mu, 1 - shape.prod(axis=1) / 64**2)
