"""Orders of an epoch as pure functions, and what the shards make of them."""

import numpy as np
import pytest
from scipy import stats

from scae_dali.data.index import ImageIndex
from scae_dali.data.longtail import profile
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import ID, Order, batches_per_epoch, epoch_size
from scae_dali.stage.stage import Stage

# 30, 15, none, 5 and 1 of the classes 0, 1, 2, 3, 4; not sorted by class.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 4], [30, 15, 5, 1]))


def order(labels=LABELS, *, batch_size=8, seed=5, **keywords):
    return Order(labels, batch_size=batch_size, seed=seed, **keywords)


def epoch(one, number=0):
    """The keys of an epoch of this shard, without those that pad it."""
    return one.keys(number * one.batches, one.batches)[: one.shard_size]


def test_every_epoch_is_another_permutation_and_a_function_of_seed_and_epoch():
    epochs = [epoch(order(), t).tolist() for t in range(20)]
    assert all(sorted(keys) == list(range(51)) for keys in epochs)
    assert len(set(map(tuple, epochs))) == 20
    assert not any(keys in epochs for keys in (epoch(order(seed=6), t).tolist() for t in range(20)))
    again = order(batch_size=5, start_epoch=3)  # in other batches, and begun later
    assert [epoch(again, t).tolist() for t in range(17)] == epochs[3:]
    assert [epoch(order(), t).tolist() for t in (7, 2, 7)] == [epochs[t] for t in (7, 2, 7)]


def test_a_shuffle_puts_every_sample_everywhere():
    one = order(np.zeros(4, int), batch_size=4)
    orders = np.array([epoch(one, t) for t in range(2400)])
    seen = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(seen) == 24  # all permutations
    assert stats.chisquare(seen).pvalue > 1e-3


def test_in_turn_is_the_order_of_the_index():
    assert epoch(order(sampling="in_turn"), 4).tolist() == list(range(51))


@pytest.mark.parametrize("sampling", ["shuffle", "class_balanced", "in_turn"])
def test_batches_may_be_asked_for_one_by_one_or_together(sampling):
    one = order(sampling=sampling)
    single = [order(sampling=sampling).keys(b) for b in range(2 * one.batches)]
    assert all(keys.shape == (8,) for keys in single)
    for t in range(2):
        together = one.keys(t * one.batches, one.batches)
        assert (
            together.tolist() == np.concatenate(single[t * one.batches :][: one.batches]).tolist()
        )
    assert (
        one.keys(one.batches - 2, 2048).tolist()
        == np.concatenate(single[one.batches - 2 : one.batches]).tolist()
    )  # no further than the epoch's end


@pytest.mark.parametrize("sampling", ["shuffle", "class_balanced", "in_turn"])
@pytest.mark.parametrize(("shards", "batch_size"), [(1, 16), (2, 16), (2, 13), (3, 17), (4, 13)])
def test_shards_partition_the_epoch_and_have_as_many_full_batches(sampling, shards, batch_size):
    keywords = {"sampling": sampling, "batch_size": batch_size}
    alone = order(**keywords)
    parts = [order(shard=s, num_shards=shards, **keywords) for s in range(shards)]
    assert len({one.batches for one in parts}) == 1
    sizes = [one.shard_size for one in parts]
    assert sum(sizes) == alone.epoch_size == parts[0].epoch_size
    assert max(sizes) - min(sizes) <= 1
    assert (parts[0].batches - 1) * batch_size < max(sizes) <= parts[0].batches * batch_size
    for t in range(2):
        together = np.concatenate([epoch(one, t) for one in parts])
        assert together.tolist() == epoch(alone, t).tolist()
        for one in parts:  # what pads a shard are samples of its own
            whole = one.keys(t * one.batches, one.batches)
            assert whole.shape == (one.batches * batch_size,)
            assert set(whole.tolist()) == set(epoch(one, t).tolist())


def test_class_balanced_takes_the_classes_in_turn():
    """Rounds of the four classes that have samples, each in an order of its own."""
    one = order(sampling="class_balanced")
    assert one.epoch_size == epoch_size(LABELS, "class_balanced") == 30 * 4
    assert epoch_size(LABELS, "shuffle") == epoch_size(LABELS, "in_turn") == 51
    epochs = [epoch(one, t) for t in range(30)]
    assert len({tuple(keys.tolist()) for keys in epochs}) == 30
    orders = []
    for keys in epochs:
        rounds = LABELS[keys & ID].reshape(30, 4)
        assert (np.sort(rounds, axis=1) == [0, 1, 3, 4]).all()
        orders += rounds.tolist()
    seen = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(seen) == 24
    assert stats.chisquare(seen).pvalue > 1e-3


def test_class_balanced_takes_a_classs_samples_in_turn_and_tells_their_occurrences():
    for t in range(3):
        keys = epoch(order(sampling="class_balanced"), t)
        ids, occurrence = keys & ID, keys >> 32
        assert len(set(keys.tolist())) == len(keys)
        for k, rounds in ((0, 1), (1, 2), (3, 6), (4, 30)):
            mine = ids[LABELS[ids] == k].reshape(rounds, -1)
            assert (np.sort(mine, axis=1) == np.flatnonzero(k == LABELS)).all()
            assert (mine == mine[0]).all()  # shuffled once an epoch
            counted = occurrence[LABELS[ids] == k].reshape(rounds, -1)
            assert (counted == np.arange(rounds)[:, None]).all()
    assert (
        epoch(order(sampling="class_balanced", seed=6)).tolist()
        != epoch(order(sampling="class_balanced")).tolist()
    )


def test_class_balanced_of_the_datasets_length_is_the_beginning_of_the_longest_epoch():
    """51 samples: twelve rounds of the four classes, and three samples of the next one."""
    short = order(sampling="class_balanced", epoch_length="dataset")
    assert short.epoch_size == epoch_size(LABELS, "class_balanced", "dataset") == 51
    assert (short.batches, batches_per_epoch(51, 8, drop_last=True)) == (7, 6)
    for t in range(3):
        whole = epoch(order(sampling="class_balanced"), t)
        assert epoch(short, t).tolist() == whole[:51].tolist()
        assert np.bincount(LABELS[epoch(short, t) & ID]).tolist() in [
            [13 - (k == left) if k != 2 else 0 for k in range(5)] for left in (0, 1, 3, 4)
        ]
    for sampling in ("shuffle", "in_turn"):  # they have every sample once anyway
        plain, same = order(sampling=sampling), order(sampling=sampling, epoch_length="dataset")
        assert epoch(same, 1).tolist() == epoch(plain, 1).tolist()


def test_the_steps_of_an_epoch_of_cifar_100_lt():
    """Those of N // B in the trainer of Kang et al.; MiSLAS has ceil(N / B) + 1, which is 86."""
    labels = np.repeat(np.arange(100), profile(500, 100, 100))
    assert len(labels) == 10_847
    sizes = [epoch_size(labels, "class_balanced", one) for one in ("dataset", "largest")]
    assert [batches_per_epoch(size, 128, drop_last=True) for size in sizes] == [84, 390]


def test_a_class_gives_several_samples_at_its_turn():
    """Rounds of 4 classes with 3 samples each: 10 rounds; in turn, so that none comes again before
    all of its class have come."""
    one = order(sampling="class_balanced", samples_per_turn=3)
    for t in range(3):
        keys = epoch(one, t)
        ids = keys & ID
        turns = LABELS[ids].reshape(10, 4, 3)
        assert (turns == turns[:, :, :1]).all()
        assert (np.sort(turns[:, :, 0], axis=1) == [0, 1, 3, 4]).all()
        for k, rounds in ((0, 1), (1, 2), (3, 6), (4, 30)):
            mine = keys[LABELS[ids] == k].reshape(rounds, -1)
            assert (np.sort(mine & ID, axis=1) == np.flatnonzero(k == LABELS)).all()
            assert (mine >> 32 == np.arange(rounds)[:, None]).all()
    assert epoch(one, 1).tolist() != epoch(one, 2).tolist()


@pytest.mark.parametrize(("epoch_length", "samples"), [("largest", 120), ("dataset", 51)])
def test_an_epoch_may_end_within_a_turn(epoch_length, samples):
    """Of 7 samples a turn and 28 a round: 120 are four rounds and 8 samples, 51 are one and 23."""
    keywords = {"sampling": "class_balanced", "epoch_length": epoch_length, "samples_per_turn": 7}
    keys = epoch(order(**keywords))
    assert len(keys) == samples
    assert len(set(keys.tolist())) == samples
    turns = [LABELS[keys[i : i + 7] & ID] for i in range(0, samples, 7)]
    assert all(len(set(turn.tolist())) == 1 for turn in turns)
    assert len(turns[-1]) == samples % 7
    parts = [order(shard=s, num_shards=3, **keywords) for s in range(3)]
    assert np.concatenate([epoch(one) for one in parts]).tolist() == keys.tolist()


def test_a_sample_that_comes_twice_is_augmented_in_two_ways():
    """Crop, flip, rectangle, weight and partner: each of the occurrence too; not so the labels."""
    labels = np.repeat([0, 1], [500, 40])
    index = ImageIndex.from_arrays([f"{i}.png" for i in range(540)], labels)
    stage = Stage(index, "scae", epochs=2, batch_size=4, seed=1, p_min=0.9, p_max=0.9, fill="color")
    planner = stage.planner(CropConfig(), keyed=True)
    ids = np.flatnonzero(labels)

    def rows(occurrence):
        keys = ids | occurrence << 32
        size_px, full_px = np.full((40, 2), 64), np.full((40, 2), 90.0)
        return planner(keys, np.zeros(40, np.int64), size_px, full_px)

    plans = [rows(k) for k in range(4)]
    np.testing.assert_array_equal(rows(2), plans[2])
    columns = planner.columns
    for name in ("label", "id", "epoch"):
        for plan in plans:
            np.testing.assert_array_equal(plan[:, columns[name]], plans[0][:, columns[name]])
    for name in ("status", "mu", "box", "start", "shape", "flip", "color", "partner_id", "key"):
        seen = {plan[:, columns[name]].tobytes() for plan in plans}
        assert len(seen) == 4, name
    np.testing.assert_array_equal(plans[3][:, columns["key"]][:, 0], ids | 3 << 32)
    crops = [planner.partner_crop(plan, np.full((40, 2), 90), CropConfig()) for plan in plans]
    assert len({window.tobytes() for window, _ in crops}) == 4


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"num_shards must be at most the 51 samples .*, got 60"):
        order(num_shards=60)
    with pytest.raises(
        ValueError, match="sampling must be one of shuffle, class_balanced, in_turn; got 'random'"
    ):
        order(sampling="random")
    with pytest.raises(ValueError, match="epoch_length must be one of largest, dataset; got 'all'"):
        order(epoch_length="all")
    with pytest.raises(ValueError, match="samples_per_turn must be at least 1, got 0"):
        order(samples_per_turn=0)
    balanced = {"sampling": "class_balanced", "epoch_length": "dataset"}
    for turn in (13, 10**12):
        message = f"samples_per_turn must be at most 12, got {turn}: an epoch of 51 samples would"
        with pytest.raises(ValueError, match=message):
            order(samples_per_turn=turn, **balanced)
    classes = LABELS[epoch(order(samples_per_turn=12, **balanced)) & ID]
    assert np.unique_counts(classes).values.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("samples", [1, 7, 16, 48, 49, 63])
def test_batches_per_epoch_are_those_that_the_shards_give(samples):
    for batch_size in (1, 3, 16):
        for shards in range(1, 1 + min(samples, 4)):
            sizes = [samples * (s + 1) // shards - samples * s // shards for s in range(shards)]
            padded = max(-(-size // batch_size) for size in sizes)
            full = min(size // batch_size for size in sizes)
            assert batches_per_epoch(samples, batch_size, shards) == padded
            assert batches_per_epoch(samples, batch_size, shards, drop_last=True) == full


def test_an_epoch_is_drawn_once_even_if_the_next_one_is_read_ahead(monkeypatch):
    order = Order(np.zeros(10, int), batch_size=4, seed=1)
    drawn, draw = [], order._draw
    monkeypatch.setattr(order, "_draw", lambda epoch: drawn.append(epoch) or draw(epoch))
    for n in range(9):
        order.keys(n)
        order.keys(n + 2)
    assert drawn == [0, 1, 2, 3]
