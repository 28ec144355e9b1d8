"""Checks that a label means the same class in training and in validation.

Folders number their classes by the order of their names, as strings; a list numbers them as it
likes. If the list's paths have a class folder, its name is compared; if they have none, numbers in
folder names are. A list that tells nothing about its classes is believed.

A folder in a path is taken for a class by the label that most of its images have, so that a few
wrong labels hide nothing. A difference is refused only with evidence that the names are those of
classes: folders may also be named by shards, cameras or people.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from scae_dali.data.index import DatasetError, ImageIndex

_NUMBER = re.compile(r"(\d+)")


class Folder(NamedTuple):
    """A folder's images of one label: how many they are, and the first one, `sample`."""

    parts: list[str]
    label: int
    images: int
    sample: int


class Name(NamedTuple):
    """What the images below folders of one name have in common.

    label: of more than half of them; None where there is none. images: with their commonest label.
    sample: the first of those.
    """

    shown: str
    label: int | None
    images: int
    total: int
    sample: int


Names = Mapping[str, Name]


def check_list_and_folders(listed: str, index: ImageIndex, folders: ImageIndex) -> None:
    """Raise DatasetError where a label of the list `index` is another class in `folders`.

    listed: the list's file. folders: an index of class folders, whatever split it is of.
    """
    rows = _folders(index)
    key = _key(folders.classes)
    label_of = {key(name): label for label, name in enumerate(folders.classes)}
    containers = _containers(rows, key)
    named = []
    for row in rows:
        names = [part for part in dict.fromkeys(row.parts) if key(part) in label_of]
        names = [part for part in names if key(part) not in containers]
        if len(names) == 1:  # with several it is unclear which one is the class folder
            named.append((key(names[0]), names[0], row))
    seen = _tally(named)
    found = {**_told(seen)} if _is_pure(seen) else {}
    whole = _class_folders(rows, key)
    if whole.keys() & label_of.keys():  # then a folder that the other split lacks is a class too
        found = {name: whole[name] for name in _only_names(whole).values()} | found
    same = sum(one.label == label_of.get(name) for name, one in found.items())
    labels = {one.label for one in found.values()}
    all_once = found.keys() == label_of.keys() and len(labels) == len(label_of)
    if all_once or _are_classes(found, same):
        for name, one in sorted(found.items(), key=lambda pair: (pair[1].label, pair[1].sample)):
            if one.label == label_of.get(name):
                continue
            own = (
                f"{one.shown!r} is {label_of[name]}"
                if name in label_of
                else f"it has no {one.shown!r}"
            )
            raise DatasetError(
                f"label {one.label} is {one.shown!r} in {listed!r} ({index.files[one.sample]!r}), "
                f"but folder {folders.classes[one.label or 0]!r} in {folders.root!r}, whose "
                "folders are numbered by name in the order of strings; number the list so "
                f"({own}), or give a list for both splits"
            )
        return
    by_number = zip(folders.classes, _by_number(folders.classes), strict=True)
    for label, (folder, name) in enumerate(by_number):
        if name != folder:
            padded = _padded(name, folders.classes)
            raise DatasetError(
                f"label {label} of {listed!r} would be folder {folder!r} in {folders.root!r}, "
                f"and by number it is {name!r}: folders are numbered by name in the order of "
                f"strings, {', '.join(map(repr, folders.classes[:4]))}, …; give a list for both "
                f"splits, or name the folders with leading zeros, {padded!r}"
            )


def check_lists(one: str, first: ImageIndex, other: str, second: ImageIndex) -> None:
    """Raise DatasetError where lists whose paths have the same class folders number them otherwise.

    one, other: their files. Several folders may make a class.
    """
    rows, others = _folders(first), _folders(second)
    key = _key({part for row in (*rows, *others) for part in row.parts})
    mine, yours = _class_folders(rows, key), _class_folders(others, key)
    # In a list of one class no folder stands out. Then the other list's class folders are sought.
    compared = [
        (mine, yours or _named(others, mine, key)),
        (mine or _named(rows, yours, key), yours),
        _endings(rows, others, key),
    ]
    for ours, theirs in compared:
        shared = sorted(ours.keys() & theirs.keys())
        same = sum(ours[name].label == theirs[name].label for name in shared)
        if not any(
            _are_classes({name: names[name] for name in shared}, same) for names in (ours, theirs)
        ):
            continue
        for name in shared:
            a, b = ours[name], theirs[name]
            if a.label != b.label:
                raise DatasetError(
                    f"{a.shown!r} has the label {a.label} in {one!r} ({first.files[a.sample]!r}) "
                    f"and {b.label} in {other!r} ({second.files[b.sample]!r}); number the classes "
                    "of both lists alike"
                )
        if ours is not mine or theirs is not yours:
            continue
        names, others_ = _only_names(mine), _only_names(yours)
        for label in sorted(names.keys() & others_.keys()):
            if names[label] != others_[label]:
                raise DatasetError(
                    f"label {label} is {mine[names[label]].shown!r} in {one!r} and "
                    f"{yours[others_[label]].shown!r} in {other!r}; number the classes of both "
                    "lists alike"
                )


def _folders(index: ImageIndex) -> list[Folder]:
    """Every pair of folder and label that occurs, in the order of the list."""
    images: Counter[tuple[str, int]] = Counter()
    first: dict[tuple[str, int], int] = {}
    for i, (path, label) in enumerate(zip(index.files, index.labels.tolist(), strict=True)):
        pair = (path.replace("\\", "/").rpartition("/")[0], label)  # a list may be made on Windows
        images[pair] += 1
        first.setdefault(pair, i)
    return [
        Folder(
            [part for part in posixpath.normpath(folder).split("/") if part not in ("", ".")],
            label,
            images[folder, label],
            i,
        )
        for (folder, label), i in first.items()
    ]


def _key(names: Collection[str]) -> Callable[[str], str]:
    """By what names are compared: without case, unless these names differ in case alone."""

    def folded(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    return folded if len({*map(folded, names)}) == len({*names}) else str


def _tally(named: Iterable[tuple[str, str, Folder]]) -> dict[str, Name]:
    """What is known of each name, by the name's key. named: (key, name, folder) of each."""
    images: dict[str, Counter[int]] = defaultdict(Counter)
    sample: dict[tuple[str, int], int] = {}
    shown: dict[str, str] = {}
    for key, name, row in named:
        images[key][row.label] += row.images
        sample.setdefault((key, row.label), row.sample)
        shown.setdefault(key, name)
    names = {}
    for key, counts in images.items():
        (label, most), total = counts.most_common(1)[0], counts.total()
        clear = label if 2 * most > total else None
        names[key] = Name(shown[key], clear, most, total, sample[key, label])
    return names


def _told(names: Names) -> dict[str, Name]:
    return {key: one for key, one in names.items() if one.label is not None}


def _is_pure(names: Names) -> bool:
    """Whether folders go with labels: two thirds of the images have their folder's label."""
    return 3 * sum(n.images for n in names.values()) >= 2 * sum(n.total for n in names.values())


def _are_classes(names: Names, same: int) -> bool:
    """Whether there is evidence that these names are of classes. same: how many of them agree.

    Several agree; or images beyond a folder's first mostly have its label, unlike those of a shard
    or a person; or a name is a word, unlike those of shards.
    """
    more = sum(one.total - 1 for one in names.values())
    alike = sum(one.images - 1 for one in names.values())
    words = any(len(one.shown) > 2 and not _NUMBER.search(one.shown) for one in names.values())
    return (same > 1 and 2 * same >= len(names)) or (0 < more <= 2 * alike) or words


def _containers(rows: list[Folder], key: Callable[[str], str]) -> set[str]:
    """Names of folders that hold the whole list, and so are no class. In a list of one class only
    the outermost folder counts."""
    parts = {*map(key, rows[0].parts[:1])}
    if len({row.label for row in rows}) > 1:
        parts = {*map(key, rows[0].parts)}
    return parts.intersection(*({*map(key, row.parts)} for row in rows))


def _class_folders(rows: list[Folder], key: Callable[[str], str]) -> dict[str, Name]:
    """The class folders in a list's paths; {} where there are none.

    They are the first folders from the left of which there are several, that go with labels, and
    that have most of the labels among them.
    """
    labels = {row.label for row in rows}
    for depth in range(min(len(row.parts) for row in rows)):
        names = _tally((key(row.parts[depth]), row.parts[depth], row) for row in rows)
        told = _told(names)
        known = {one.label for one in told.values()}
        if len(names) > 1 and _is_pure(names) and 2 * len(known) > len(labels):
            return told
    return {}


def _named(rows: list[Folder], names: Names, key: Callable[[str], str]) -> dict[str, Name]:
    """Those of `names` that are folders in the paths, at any depth."""
    containers = _containers(rows, key)
    found = []
    for row in rows:
        parts = [part for part in dict.fromkeys(row.parts) if key(part) in names]
        parts = [part for part in parts if key(part) not in containers]
        if len(parts) == 1:
            found.append((key(parts[0]), parts[0], row))
    seen = _tally(found)
    return _told(seen) if _is_pure(seen) else {}


def _endings(
    rows: list[Folder], others: list[Folder], key: Callable[[str], str]
) -> tuple[dict[str, Name], dict[str, Name]]:
    """The longest endings of folders, such as `kitchen/in`, that two lists share, for each list."""

    def of(row: Folder) -> list[tuple[str, str]]:
        ends = ["/".join(row.parts[start:]) for start in range(len(row.parts))]
        return [("/".join(map(key, end.split("/"))), end) for end in ends]

    mine = _tally((name, shown, row) for row in rows for name, shown in of(row))
    longest = []
    for row in others:
        if pair := next((pair for pair in of(row) if pair[0] in mine), None):
            longest.append((*pair, row))
    yours = _tally(longest)
    mine = {name: mine[name] for name in yours}
    whole = []
    for side, names in ((rows, mine), (others, yours)):
        several = len({row.label for row in side}) > 1
        total = sum(row.images for row in side)
        whole += [name for name, one in names.items() if several and one.total == total]
    for name in {*whole}:
        del mine[name], yours[name]
    if not (_is_pure(mine) and _is_pure(yours)):
        return {}, {}
    return _told(mine), _told(yours)


def _only_names(names: Names) -> dict[int, str]:
    """Label -> the key of its name, for labels that have a single name."""
    keys: dict[int, list[str]] = defaultdict(list)
    for key, one in names.items():
        if one.label is not None:
            keys[one.label].append(key)
    return {label: some[0] for label, some in keys.items() if len(some) == 1}


def _by_number(classes: Collection[str]) -> list[str]:
    """Class names in the order of the numbers in them: class_2 before class_10. The order is kept
    if they have no numbers, or differ in more than these."""
    parts = [_NUMBER.split(name) for name in classes]
    numbers = [[int(number) for number in one[1::2]] for one in parts]
    if len({tuple(one[::2]) for one in parts}) > 1 or not numbers[0]:
        first = [int(one[1]) if len(one) > 1 and not one[0] else -1 for one in parts]
        if sorted(first) not in ([*range(len(first))], [*range(1, len(first) + 1)]):
            return [*classes]
        numbers = [[number] for number in first]  # 0_tench, 1_goldfish, …: each number once
    return [name for _, name in sorted(zip(numbers, classes, strict=True))]


def _padded(name: str, classes: Collection[str]) -> str:
    width = max(len(number) for one in classes for number in _NUMBER.findall(one))
    return _NUMBER.sub(lambda match: match[0].zfill(width), name)
