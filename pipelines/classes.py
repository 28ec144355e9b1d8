"""Whether training and validation mean the same class by a label.

Folders number their classes by the order of their names, as strings; a list numbers them as it
likes. Where the list's paths have a class folder, that is compared; where they have none, numbers
as folder names are. A list that tells nothing about its classes is believed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from scae_dali.dataset import DatasetError, ImageIndex


def check_list_and_folders(listed: str, index: ImageIndex, folders: ImageIndex) -> None:
    """Raise DatasetError where a label of the list `index` is another class in `folders`.

    listed: the list's file. folders: an index of class folders, whatever split it is of.
    """
    places = {name: label for label, name in enumerate(folders.classes)}
    named = []
    for parts, label, i in _folders(index):
        names = places.keys() & parts
        if len(names) == 1:  # of several it is unclear which is the class folder
            named.append((names.pop(), label, i))
    found = _labels_of(named)
    whole = _class_folders(index)
    if whole.keys() & places.keys():  # then a folder that the other split lacks is a class too
        alone = {name: whole[name] for name in _only_names(whole).values()}
        found = {**alone, **found}
    for name, (label, i) in sorted(found.items(), key=lambda one: one[1]):
        if label != places.get(name):
            own = f"{name!r} is {places[name]}" if name in places else f"it has no {name!r}"
            raise DatasetError(
                f"label {label} is {name!r} in {listed!r} ({index.files[i]!r}), but folder "
                f"{folders.classes[label]!r} in {folders.root!r}, whose folders are numbered by "
                f"name in the order of strings; number the list so ({own}), or give a list for "
                "both splits"
            )
    if found or not all(name.isdecimal() for name in folders.classes):
        return
    for label, name in enumerate(sorted(folders.classes, key=int)):
        folder = folders.classes[label]
        if name != folder:
            width = max(map(len, folders.classes))
            raise DatasetError(
                f"label {label} of {listed!r} would be folder {folder!r} in {folders.root!r}, "
                f"and by number it is {name!r}: folders are numbered by name in the order of "
                f"strings, {', '.join(map(repr, folders.classes[:4]))}, …; give a list for both "
                f"splits, or name the folders with leading zeros, {name.zfill(width)!r}"
            )


def check_lists(one: str, first: ImageIndex, other: str, second: ImageIndex) -> None:
    """Raise DatasetError where lists whose paths have the same class folders number them otherwise.

    one, other: their files. Several folders may make a class.
    """
    mine, yours = _class_folders(first), _class_folders(second)
    for name in sorted(mine.keys() & yours.keys()):
        if mine[name][0] != yours[name][0]:
            raise DatasetError(
                f"{name!r} has the label {mine[name][0]} in {one!r} "
                f"({first.files[mine[name][1]]!r}) and {yours[name][0]} in {other!r} "
                f"({second.files[yours[name][1]]!r}); number the classes of both lists alike"
            )
    if not mine.keys() & yours.keys():
        return  # other names for the same classes, as far as can be told
    names, theirs = _only_names(mine), _only_names(yours)
    for label in sorted(names.keys() & theirs.keys()):
        if names[label] != theirs[label]:
            raise DatasetError(
                f"label {label} is {names[label]!r} in {one!r} and {theirs[label]!r} in {other!r}; "
                "number the classes of both lists alike"
            )


def _folders(index: ImageIndex) -> list[tuple[list[str], int, int]]:
    """The folders of a path, its label and a sample, of every folder and label that there are."""
    first: dict[tuple[str, int], int] = {}
    for i, (path, label) in enumerate(zip(index.files, index.labels.tolist(), strict=True)):
        first.setdefault((path.rpartition("/")[0], label), i)
    return [(folder.split("/"), label, i) for (folder, label), i in first.items()]


def _labels_of(named: Iterable[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Names -> label and a sample, of (name, label, sample); a name of several labels is no
    class."""
    labels: dict[str, set[int]] = defaultdict(set)
    sample: dict[str, int] = {}
    for name, label, i in named:
        labels[name].add(label)
        sample.setdefault(name, i)
    return {name: (some.pop(), sample[name]) for name, some in labels.items() if len(some) == 1}


def _class_folders(index: ImageIndex) -> dict[str, tuple[int, int]]:
    """The class folders in a list's paths -> label and a sample; {} where there are none.

    They are the first folders from the left of which each has one label, and of which there are
    several.
    """
    folders = _folders(index)
    for place in range(min(len(parts) for parts, *_ in folders)):
        found = _labels_of((parts[place], label, i) for parts, label, i in folders)
        if 1 < len(found) == len({parts[place] for parts, *_ in folders}):
            return found
    return {}


def _only_names(folders: Mapping[str, tuple[int, int]]) -> dict[int, str]:
    """Labels -> the folder, for those that have one alone."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, (label, _) in folders.items():
        names[label].append(name)
    return {label: some[0] for label, some in names.items() if len(some) == 1}
