"""The data of a run, by its settings: folders, lists, archives or CIFAR, long-tailed or not, on
disk or in memory."""

import os
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from pipelines.classes import check_list_and_folders, check_lists
from scae_dali.checks import check, check_choice, expand_home
from scae_dali.data.broken import check_regular, of_validation
from scae_dali.data.index import ARCHIVES, DatasetError, ImageIndex, of_archives
from scae_dali.data.longtail import choose, imbalanced
from scae_dali.data.pixels import ArrayImages
from scae_dali.data.tfrecord import IMAGE, LABEL
from scae_dali.training.ranks import Ranks, together

Ids = npt.NDArray[np.int64]
Format = Literal["folder", "cifar10", "cifar100", "webdataset", "tfrecord"]
# Settings that not all formats have: what they are for, and which formats have them.
_OF: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("train_dir", "val_dir", "train_list", "val_list"), ("files", ("folder",))),
    **dict.fromkeys(("exclude", "val_exclude", "index_cache"), ("files", ("folder", *ARCHIVES))),
    **dict.fromkeys(("train", "val", "first_label"), ("archives", ARCHIVES)),
    **dict.fromkeys(("image_field", "label_field"), ("TFRecords", ("tfrecord",))),
}


@dataclass(frozen=True, eq=False)
class Data:
    """The training and the validation images, of the same classes.

    The pixels, uint8 [N, H, W, 3] and read-only, are those of the index beside them; None where
    the index's files are read from disk.
    """

    train: ImageIndex
    val: ImageIndex
    train_pixels: npt.NDArray[np.uint8] | None = None
    val_pixels: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are, and which of them are trained on.

    Args:
        root: Folder of the data set. It holds train/ and val/, or the files that the lists name, or
            the archives, or CIFAR's files as torchvision downloads them.
        format: `folder` reads image files, from folders or lists. `webdataset` reads tars of images
            and labels, `tfrecord` TFRecord files. `cifar10` and `cifar100` read CIFAR's own files
            into memory.
        train_dir: Folder of the training images in root, with one folder for each class.
        val_dir: Folder of the validation images in root; in other data sets often called test.
        train_list: Text file of the training images, instead of train_dir. Each line is a path
            relative to root, a space and the number of the class.
        val_list: The same for the validation images, instead of val_dir.
        exclude: Text file of training images to leave out, one path relative to train_dir, or as in
            train_list, on each line. `scae-dali check-images` writes one.
        val_exclude: The same for the validation images, or for those that `holdout` sets aside.
        train: Archives of the training images in root, such as train-{0000..1023}.tar or
            train-*.tar.
        val: The same for the validation images.
        first_label: Number that the archives give to the first class. null takes 1 if their labels
            run from 1, as in ImageNet's TFRecords, and 0 if they run from 0.
        image_field: Feature of a TFRecord that holds the encoded image.
        label_field: Feature of a TFRecord that holds the number of the class.
        index_cache: Folder in which the lists of files are kept, so that the next run need not scan
            the folders. null scans them. What archives hold is kept there too; null keeps it beside
            each of them.
        in_memory: Decode all images once and keep them in memory. They must all have one size.
            CIFAR's own files always are in memory.
        imbalance: Train on a long-tailed subset, whose largest class has this many times the images
            of the smallest.
        imbalance_seed: Seed of the choice of the subset. 0 is the published subset of CIFAR's own
            files.
        holdout: Validate on this many training images of each class, which are then not trained
            on, instead of on val_dir or val_list. Choose settings with it, not on test images.
    """

    root: str
    format: Format = "folder"
    train_dir: str = "train"
    val_dir: str = "val"
    train_list: str | None = None
    val_list: str | None = None
    exclude: str | None = None
    val_exclude: str | None = None
    train: str | None = None
    val: str | None = None
    first_label: int | None = None
    image_field: str = IMAGE
    label_field: str = LABEL
    index_cache: str | None = None
    in_memory: bool = False
    imbalance: float | None = None
    imbalance_seed: int = 0
    holdout: int = 0

    def __post_init__(self) -> None:
        paths = ("root", "train_dir", "val_dir", "train_list", "val_list", "exclude", "val_exclude")
        expand_home(self, *paths, "train", "val", "index_cache")
        check_choice("data.format", self.format, get_args(Format))
        for field in fields(self):
            value = getattr(self, field.name)
            what, formats = _OF.get(field.name, ("", get_args(Format)))
            check(
                self.format in formats or value == field.default,
                f"data.{field.name} is for {what}, got {value!r} with data.format={self.format}; "
                f"leave it out, or give another data.format: {' or '.join(formats)}",
            )
        for split in ("train", "val")[: 1 if self.holdout else 2]:
            check(
                self.format not in ARCHIVES or bool(getattr(self, split)),
                f"data.{split} must name archives with data.format={self.format}, got "
                f"{getattr(self, split)!r}; give a pattern relative to data.root, such as "
                f"'{split}-{{0000..0127}}.tar'",
            )
        for split, folder in (("train", self.train_dir), ("val", self.val_dir)):
            listed = getattr(self, f"{split}_list")
            check(
                listed is None or folder == split,
                f"data.{split}_list and data.{split}_dir exclude each other, got {listed!r} and "
                f"{folder!r}; the list's paths are relative to data.root",
            )
        check(
            self.imbalance is None or self.imbalance >= 1,
            f"data.imbalance must be at least 1, got {self.imbalance}; published subsets have 10, "
            f"50 and 100",
        )
        check(
            0 <= self.imbalance_seed < 1 << 32,
            f"data.imbalance_seed must be in [0, 2^32), got {self.imbalance_seed}",
        )
        check(
            self.holdout >= 0,
            f"data.holdout must be at least 0, got {self.holdout}; it counts images of each class",
        )
        check(
            not self.holdout or (self.val_dir, self.val_list) == ("val", None),
            f"data.holdout={self.holdout} validates on training images, so leave out data.val_dir "
            f"and data.val_list, got {self.val_dir!r} and {self.val_list!r}",
        )
        check(
            not self.holdout or self.val is None,
            f"data.holdout={self.holdout} validates on training images, so leave out data.val, got "
            f"{self.val!r}",
        )
        check(
            self.first_label is None or self.first_label >= 0,
            f"data.first_label must be at least 0, got {self.first_label}; 0 and 1 are usual",
        )

    def open(self, threads: int = 4) -> Data:
        """Index the images, or read them. threads: of the decoder, for in_memory. Raises
        DatasetError for folders, lists or files that cannot be used, ValueError for an imbalance or
        a holdout that leaves a class empty."""
        if self.format in ("cifar10", "cifar100"):
            whole = ArrayImages.from_cifar(self.root, self.format, train=True)
            kept, held = self._split(whole.index)
            train = whole if kept is None else whole.subset(kept)
            if held is None:
                val = ArrayImages.from_cifar(self.root, self.format, train=False)
            else:
                val = whole.subset(held)
            return Data(train.index, val.index, train.pixels, val.pixels)
        files = self._train_files()
        kept, held = self._split(files)
        first = files if kept is None else files.subset(kept)
        second = self._val_files(files) if held is None else files.subset(held)
        if self.val_exclude is not None:
            second = self._without(second, self.val_exclude)
        if not self.in_memory:
            return Data(first, second)
        pixels = ArrayImages.from_index(first, threads=threads).pixels
        try:
            val_pixels = ArrayImages.from_index(second, threads=threads).pixels
        except DatasetError as error:
            raise DatasetError(of_validation(str(error))) from error
        return Data(first, second, pixels, val_pixels)

    def index_archives(self) -> None:
        """Index the archives, if there are any, so that the next process need not."""
        if self.format in ARCHIVES:
            first = self._train_files()
            if not self.holdout:
                self._val_files(first)

    @staticmethod
    def _without(index: ImageIndex, exclude: str) -> ImageIndex:
        try:
            return index.without(exclude)
        except DatasetError as error:
            raise DatasetError(f"data.val_exclude={exclude!r}, of validation: {error}") from error

    def _split(self, index: ImageIndex) -> tuple[Ids | None, Ids | None]:
        """Ids to train on, None for all of them, and ids held out, None without a holdout."""
        kept = held = None
        if self.holdout:
            counts = index.class_counts
            if (short := np.flatnonzero((counts > 0) & (counts <= self.holdout))).size:
                k = short[counts[short].argmin()]
                raise ValueError(
                    f"data.holdout={self.holdout} leaves no image of class {index.classes[k]!r}, "
                    f"which has {counts[k]}; give less than that"
                )
            held = choose(index.labels, np.minimum(counts, self.holdout))
            kept = np.setdiff1d(np.arange(len(index)), held)
        if self.imbalance is not None:
            labels = index.labels if kept is None else index.labels[kept]
            tailed = imbalanced(labels, index.num_classes, self.imbalance, seed=self.imbalance_seed)
            kept = tailed if kept is None else kept[tailed]
        return kept, held

    def _train_files(self) -> ImageIndex:
        if self.format in ARCHIVES:
            return self._archives("train", self.first_label, self.exclude or ())
        if self.train_list is None:
            return self._folder("train", self.train_dir, self.exclude or ())
        return ImageIndex.from_list(self.train_list, self.root, exclude=self.exclude or ())

    def _val_files(self, first: ImageIndex) -> ImageIndex:
        """first: all files of training, whose classes they must have."""
        if first.archives is not None:
            return self._val_archives(first, first.archives.first_label)
        if self.val_list is not None:
            second = ImageIndex.from_list(self.val_list, self.root)
            _check_labels(f"data.val_list={self.val_list!r}", second, first, "lists")
            if self.train_list is None:
                check_list_and_folders(self.val_list, second, first)
            else:
                check_lists(self.train_list, first, self.val_list, second)
            return second.relabelled(second.labels, first.classes)
        second = self._folder("val", self.val_dir)
        if self.train_list is not None and first.num_classes != second.num_classes:
            raise DatasetError(
                f"data.train_list={self.train_list!r} has the classes 0 … {first.num_classes - 1}, "
                f"{second.root!r} {second.num_classes} class folders; the folders, sorted by name, "
                f"must be the list's classes: give data.val_list if they are others"
            )
        if self.train_list is not None:
            check_list_and_folders(self.train_list, first, second)
        elif first.classes != second.classes:
            raise DatasetError(_other_classes(first, second))
        return second

    def _val_archives(self, first: ImageIndex, first_label: int) -> ImageIndex:
        second = self._archives("val", first_label)
        _check_labels(f"data.val={self.val!r}", second, first, "archives", first_label)
        return second.relabelled(second.labels, first.classes)

    def _archives(
        self, split: str, first_label: int | None, exclude: str | tuple[()] = ()
    ) -> ImageIndex:
        pattern = getattr(self, split)
        try:
            return of_archives(
                self.format,
                pattern,
                self.root,
                image=self.image_field,
                label=self.label_field,
                first_label=first_label,
                exclude=exclude,
                cache=self.index_cache,
            )
        except DatasetError as error:
            raise DatasetError(f"data.{split}={pattern!r}: {error}") from error

    def _folder(self, split: str, name: str, exclude: str | tuple[()] = ()) -> ImageIndex:
        folder = os.path.join(self.root, name)
        if os.path.isdir(self.root) and not os.path.isdir(folder):
            inside = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
            found = ", ".join(inside[:5]) + (", …" if len(inside) > 5 else "")
            raise DatasetError(
                f"data.root={self.root!r} has no folder {name!r}, it has {found or 'none at all'}; "
                f"data.{split}_dir names the one to take"
            )
        cache = None
        if self.index_cache is not None:
            os.makedirs(self.index_cache, exist_ok=True)
            cache = os.path.join(self.index_cache, f"{split}.npz")
        return ImageIndex(folder, exclude=exclude, cache=cache, allow_empty=split == "val")


def _other_classes(first: ImageIndex, second: ImageIndex) -> str:
    """How the class folders of training and validation differ, and what to do."""

    def lacks(one: ImageIndex, other: ImageIndex) -> str:
        names = sorted(set(other.classes) - set(one.classes))
        said = ", ".join(map(repr, names[:3])) + ", …" * (len(names) > 3)
        return said and f"; {one.root!r} lacks {said}: "

    said = f"{first.root!r} and {second.root!r} must have the same class folders"
    if lacking := lacks(second, first):
        said += f"{lacking}add them; an empty folder stands for a class without validation images"
    if lacking := lacks(first, second):
        said += f"{lacking}add training images of them, or remove them from {second.root!r}"
    return said


def _check_labels(
    setting: str, second: ImageIndex, first: ImageIndex, what: str, first_label: int = 0
) -> None:
    """Raise DatasetError where validation images have labels that those of training have not."""
    if second.num_classes > first.num_classes:
        i = int(second.labels.argmax())
        raise DatasetError(
            f"{setting} gives {second.files[i]!r} the label {first_label + second.labels[i]}, but "
            f"training has the classes {first_label} … {first_label + first.num_classes - 1}; give "
            f"{what} of the same classes"
        )


def open_data(config: DataConfig, threads: int, ranks: Ranks) -> Data:
    """The data, in every rank. One rank of each node indexes archives, the others read what it has
    kept. Raises ValueError where there are fewer images than ranks, or the list of the training
    images names what is no file."""
    together(ranks, config.index_archives if ranks.local == 0 else None)
    data = config.open(threads)
    if config.train_list is not None and data.train_pixels is None:
        ranks.by_first(lambda: check_regular(data.train))
    for name, index in (("training", data.train), ("validation", data.val)):
        check(
            len(index) >= ranks.world,
            f"processes must be at most the {len(index)} {name} images, of which each takes a "
            f"share, got {ranks.world}: start fewer processes",
        )
    return data
