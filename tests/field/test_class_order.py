"""Folders are numbered by name as strings, so that 10 comes before 2, and lists as they like. With
a list for one split and folders for the other, all classes were permuted without a word.
https://github.com/modestyachts/ImageNetV2/issues/10, https://github.com/pytorch/vision/issues/714,
https://github.com/CSAILVision/places365/issues/22
"""

import pytest

from pipelines.data import DataConfig
from scae_dali.data.index import DatasetError

NUMBERS = [str(number) for number in range(12)]
ANIMALS = ["bee", "cat", "dog"]


@pytest.fixture
def place(tmp_path):
    """Makes root/<split>/<name>/0.jpg, which nobody decodes."""

    def make(split, names, *, files=1):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(files):
                (tmp_path / split / name / f"{number}.jpg").touch()
        return tmp_path

    return make


def listed(root, name, lines):
    (root / name).write_text("".join(f"{path} {label}\n" for path, label in lines))
    return str(root / name)


def opened(root, **lists):
    return DataConfig(root=str(root), **lists).open()


@pytest.mark.parametrize("split", ["train", "val"])
def test_numbers_against_folders_in_the_order_of_strings(place, split):
    other = {"train": "val", "val": "train"}[split]
    root = place(other, NUMBERS)
    flat = listed(root, "flat.txt", [(f"all/{name}.jpg", name) for name in NUMBERS])
    with pytest.raises(
        DatasetError, match=r"label 2 of '.*flat.txt' would be folder '10' .* is '2'"
    ):
        opened(root, **{f"{split}_list": flat})
    deep = listed(root, "deep.txt", [(f"{split}/{name}/0.jpg", name) for name in NUMBERS])
    with pytest.raises(DatasetError, match=r"label 2 is '2' in '.*deep.txt' .*but folder '10' in"):
        opened(root, **{f"{split}_list": deep})


@pytest.mark.parametrize("split", ["train", "val"])
def test_names_in_another_order_than_the_alphabets(place, split):
    root = place({"train": "val", "val": "train"}[split], ANIMALS)
    order = ["dog", "bee", "cat"]
    paths = [(f"{split}/{name}/more/{n}.jpg", k) for k, name in enumerate(order) for n in (1, 2)]
    with pytest.raises(
        DatasetError,
        match=r"label 0 is 'dog' in '.*l.txt' .*'bee' in .*\('dog' is 2\), or give a l",
    ):
        opened(root, **{f"{split}_list": listed(root, "l.txt", paths)})
    others = [(f"{split}/{name}/1.jpg", k) for k, name in enumerate(["bee", "cow", "dog"])]
    with pytest.raises(DatasetError, match=r"label 1 is 'cow' .* folder 'cat' .*it has no 'cow'"):
        opened(root, **{f"{split}_list": listed(root, "o.txt", others)})


def test_a_list_for_both_is_the_remedy_and_lists_are_compared(place):
    root = place("train", [])
    first = [(f"train/{name}/1.jpg", name) for name in NUMBERS]
    second = [(f"val/{name}/1.jpg", name) for name in NUMBERS]
    one = listed(root, "one.txt", first)
    data = opened(root, train_list=one, val_list=listed(root, "two.txt", second))
    assert data.val.labels.tolist() == [*range(12)]
    swapped = [*second[:5], ("val/5/1.jpg", 6), ("val/6/1.jpg", 5), *second[7:]]
    with pytest.raises(DatasetError, match=r"'5' has the label 5 in .*one.txt.* and 6 in .*thr"):
        opened(root, train_list=one, val_list=listed(root, "three.txt", swapped))
    renamed = [*second[:5], ("val/five/1.jpg", 5), *second[6:]]
    with pytest.raises(DatasetError, match=r"label 5 is '5' in '.*one.txt' and 'five' in '.*four"):
        opened(root, train_list=one, val_list=listed(root, "four.txt", renamed))


def test_what_agrees_or_cannot_be_told_is_allowed(place):
    root = place("train", NUMBERS)
    ordered = sorted(NUMBERS)
    in_order = [(f"val/{name}/0.jpg", k) for k, name in enumerate(ordered)]
    assert opened(root, val_list=listed(root, "1.txt", in_order)).val.num_classes == 12
    animals = place("train/animals", ANIMALS) / "train" / "animals"
    flat = [(f"val/ILSVRC_{k}.jpg", k) for k in (2, 0, 1, 1)]
    config = {"train_dir": "train/animals"}
    assert len(opened(root, **config, val_list=listed(root, "2.txt", flat)).val) == 4
    sloppy = [(f"val/{name}/{k}.jpg", k) for name in ANIMALS for k in range(3)]  # noise in labels
    assert len(opened(root, **config, val_list=listed(root, "3.txt", sloppy)).val) == 9
    super_one = [("t/pug/1.jpg", 0), ("t/poodle/1.jpg", 0), ("t/siamese/1.jpg", 1)]
    super_two = [("v/pug/1.jpg", 0), ("v/beagle/1.jpg", 0), ("v/siamese/1.jpg", 1)]
    lists = {"train_list": listed(root, "4.txt", super_one)}
    assert len(opened(root, **lists, val_list=listed(root, "5.txt", super_two)).val) == 3
    synsets = [("v/n02110958/1.jpg", 0), ("v/n02123597/1.jpg", 1)]
    assert len(opened(root, **lists, val_list=listed(root, "6.txt", synsets)).val) == 2
    assert animals.is_dir()
    padded = place("val", [name.zfill(2) for name in NUMBERS])
    numbers = listed(root, "7.txt", [(f"all/{name}.jpg", name) for name in NUMBERS])
    assert opened(padded, train_list=numbers).train.num_classes == 12


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"class_{k}" for k in range(12)], r"2 .* 'class_10' .* is 'class_2'.* 'class_02'"),
        ([f"s{k}" for k in range(1, 15)], r"1 .* 's10' .* is 's2'.* 's02'"),
        (["0_eel", "10_ray", *(f"{k}_fish" for k in range(1, 10))], r"1 .* '10_ray' .* '01_fish'"),
    ],
)
def test_numbers_within_names_have_an_order_too(place, names, said):
    root = place("train", names)
    flat = listed(root, "flat.txt", [(f"all/{k}.jpg", k) for k in range(len(names))])
    with pytest.raises(DatasetError, match=f"label {said}"):
        opened(root, val_list=flat)
    even = place("even", [f"{k:02d}.bird" for k in range(len(names))])
    assert opened(even, train_dir="even", val_list=flat)


def test_a_few_wrong_labels_hide_nothing(place):
    root = place("train", ANIMALS)
    right = [(f"v/{name}/{n}.jpg", k) for k, name in enumerate(ANIMALS) for n in range(4)]
    noise = [(f"v/{name}/x.jpg", (k + 1) % 3) for k, name in enumerate(ANIMALS)]
    turned = [(path, (label + 1) % 3) for path, label in right]
    fine = listed(root, "1.txt", right + noise)
    assert opened(root, val_list=fine).val.num_classes == 3
    bad = listed(root, "2.txt", turned + [(path, (label + 1) % 3) for path, label in noise])
    with pytest.raises(DatasetError, match=r"label 0 is 'dog' in"):
        opened(root, val_list=bad)
    with pytest.raises(DatasetError, match=r"'bee' has the label 0 in .* and 1 in"):
        opened(root, train_list=fine, val_list=bad)
    assert opened(root, train_list=fine, val_list=listed(root, "3.txt", right))


def lists(root, train, val):
    one, two = listed(root, "train.txt", train), listed(root, "val.txt", val)
    return opened(root, train_list=one, val_list=two)


def test_classes_of_two_folders_are_compared_by_both(place):
    rooms = ["hall/in", "hall/out", "loft", "shop/toy/in", "shop/toy/out"]
    train = [(f"t/{room}/{n}.jpg", k) for k, room in enumerate(rooms) for n in (1, 2)]
    swap = {0: 1, 1: 0}
    same = [(path.replace("t/", "v/", 1), label) for path, label in train]
    assert lists(place("train", []), train, same)
    with pytest.raises(DatasetError, match=r"'hall/in' has the label 0 in .* and 1 in"):
        lists(place("train", []), train, [(path, swap.get(label, label)) for path, label in same])


def test_of_a_list_of_one_class_the_other_ones_folders_are_sought(place):
    train = [(f"train/{name}/{n}.jpg", k) for k, name in enumerate(ANIMALS) for n in (1, 2)]
    for inner in ("", "more/"):
        wrong = [(f"val/dog/{inner}{n}.jpg", 0) for n in (1, 2)]
        first = [*wrong, ("val/x.jpg", 2)]  # of as many classes
        for pair in ((train, wrong), (first, train)):
            with pytest.raises(DatasetError, match=r"'dog' has the label \d in"):
                lists(place("train", []), *pair)
    assert lists(place("train", []), train, [("val/dog/1.jpg", 2), ("val/dog/2.jpg", 2)])


def test_case_and_the_separators_of_windows_do_not_hide_a_class(place):
    root = place("train", ANIMALS)
    for form in ("v/{}/1.jpg", "v\\{}\\1.jpg"):
        names = [form.format(name) for name in ("Dog", "BEE", "Cat")]
        with pytest.raises(DatasetError, match=r"label 0 is 'Dog' in"):
            opened(root, val_list=listed(root, "1.txt", zip(names, range(3), strict=True)))
        assert opened(root, val_list=listed(root, "2.txt", zip(names, (2, 0, 1), strict=True)))
    both = place("cases", ["Bee", "bee", "cat"])  # upper case comes first
    right = [("v/Bee/1.jpg", 0), ("v/bee/1.jpg", 1), ("v/cat/1.jpg", 2)]
    assert opened(both, train_dir="cases", val_list=listed(root, "3.txt", right))


def test_containers_shards_and_people_are_no_classes(place):
    root = place("train", ["cat", "dog", "images"])
    for labels in ((0, 1), (0, 0), (1, 1, 0)):
        flat = [(f"images/{n}.jpg", label) for n, label in enumerate(labels)]
        assert opened(root, val_list=listed(root, "1.txt", flat))
    inside = [("images/dog/1.jpg", 0), ("images/cat/1.jpg", 1)]
    with pytest.raises(DatasetError, match="label 0 is 'dog'"):
        opened(root, val_list=listed(root, "2.txt", inside))
    shards = place("numbers", [f"{k:02d}" for k in range(6)])
    some = [("v/03/x.jpg", 0), ("v/01/y.jpg", 2), ("v/00/z.jpg", 1), ("v/00/u.jpg", 4)]
    assert opened(shards, train_dir="numbers", val_list=listed(root, "3.txt", some))
    people = [(f"p{k}/1.jpg", k % 3) for k in range(7)]
    later = [(f"p{k}/9.jpg", (k + 1) % 3) for k in range(7)]
    assert lists(root, people, later)
