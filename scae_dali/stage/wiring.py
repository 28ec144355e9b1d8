"""Refuses a stage that is wired wrongly into a pipeline, which would give wrong results silently.

Most is seen in the graph while the pipeline is being defined: ids that are class labels, images
that are normalised or flipped already, a window of another crop. How many samples the reader has,
and whether ids repeat, is seen when the pipeline runs. Every message says what was found, and what
to do instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline
from nvidia.dali.pipeline import do_not_convert

from scae_dali.data.index import ImageIndex
from scae_dali.methods.base import DataNode, Run
from scae_dali.stage import graph
from scae_dali.stage.history import History, history

__all__ = [
    "EachOnce",
    "check_executor",
    "check_frames",
    "check_ids",
    "check_images",
    "check_reader",
    "check_sources",
    "check_window",
    "checked_size",
]

_READ = "fn.readers.file(files=list(index.files), file_root=index.root, …), without labels="
_BY_NAME = 'ids=fn.get_property(jpegs, key="source_info")'


def check_executor(pipeline: Pipeline) -> None:
    """Raise ValueError for a pipeline whose Python operators never return.

    DALI 2.4 waits for ever at the first batch where it prepares batches ahead without a thread of
    its own.
    """
    if pipeline.exec_async or pipeline.exec_dynamic or not pipeline.exec_pipelined:
        return
    if pipeline.prefetch_queue_depth != 1:
        raise ValueError(
            "exec_async must be True where a stage is in the pipeline, got False: DALI would hang "
            "at the first batch, as with any Python operator; leave exec_async out, or pass "
            "exec_pipelined=False or prefetch_queue_depth=1 too"
        )


@do_not_convert
def check_ids(ids: DataNode, index: ImageIndex) -> graph.Origin | None:
    """Where ids come from; None where that is unknown.

    Raises ValueError for what cannot be ids of this index: encoded images, class labels, places in
    another list of files.
    """
    origin = graph.origin(ids)
    if origin is None:
        return None
    if origin.kind == "GetProperty" and (key := origin.arguments.get("key")) != "source_info":
        raise ValueError(f"ids must be places in the index or names, got the property {key!r}; "
                         f"pass {_BY_NAME}")  # fmt: skip
    if origin.kind == "File":
        if origin.output == 0:
            raise ValueError(
                "ids must be places in the index or names, got the reader's first output, which is "
                f"the encoded image; pass the second, of {_READ}, or {_BY_NAME}"
            )
        _check_files(origin.arguments, index)
    return origin


def _check_files(arguments: Mapping[str, Any], index: ImageIndex) -> None:
    """Raise ValueError unless the labels that a file reader gives are places in the index.

    arguments: of fn.readers.file.
    """
    files, labels = arguments.get("files"), arguments.get("labels")
    root = str(arguments.get("file_root") or "")
    if files is None and arguments.get("file_list"):
        files, labels = _listed(str(arguments["file_list"]))
    if files is None:
        raise ValueError(
            f"ids must be places in the index, got the class labels that fn.readers.file gives of "
            f"file_root={root!r}; read {_READ}, or keep the reader and pass {_BY_NAME}"
        )
    if labels is None and tuple(files) == index.files:
        return
    places = range(len(files)) if labels is None else map(int, labels)
    for file, place in zip(map(str, files), places, strict=True):
        found = index.files[place] if 0 <= place < len(index) else None
        if found is None or not _same(file, found, root, index.root):
            raise ValueError(
                f"ids must be places in the index, but the reader gives {place} for {file!r}, and "
                f"at that place the index has {'nothing' if found is None else repr(found)}; read "
                f"{_READ}, or keep the reader and pass {_BY_NAME}"
            )


def _same(file: str, name: str, file_root: str, name_root: str) -> bool:
    """Whether two paths may be of one file: equal, with their roots or without, or one the end of
    the other."""
    if file == name or file.endswith(f"/{name}") or name.endswith(f"/{file}"):
        return True
    one, other = os.path.join(file_root, file), os.path.join(name_root, name)
    return os.path.normpath(one) == os.path.normpath(other)


def _listed(path: str) -> tuple[list[str], list[str] | None]:
    """Files and labels of a list as fn.readers.file takes it; DALI itself says what is wrong."""
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        pairs = [line.rsplit(maxsplit=1) for line in lines if line.strip()]
    return [pair[0] for pair in pairs], [pair[-1] for pair in pairs]


@do_not_convert
def check_images(
    images: DataNode,
    *,
    window: Sequence[DataNode] | None,
    size: tuple[int, int] | None,
    run: Run,
    guided: bool,
    fills: bool,
) -> bool:
    """Raise ValueError where the graph shows that images are not as the stage takes them.

    guided: whether maps of the whole upright image are laid over them, which must then lie the same
    way round. fills: whether the method fills regions or mixes in other images, whose values must
    then be of the same range. Returns whether the graph fixes the size of the images.
    """
    past = history(images)
    if past is None:
        return False
    if past.layout is not None and past.layout != "HWC":
        raise ValueError(
            f"images must be HWC, got {past.layout}; call the stage before the normalisation or "
            'the transposition, or give crop_mirror_normalize output_layout="HWC"'
        )
    if fills and past.scaled and run.grey_levels:
        raise ValueError(
            f"images must be in grey levels 0 … 255 where mean is {run.mean}, got those of "
            f"{past.scaled}; call the stage before it, or pass the mean and std that its images "
            "have, mean=(0, 0, 0) and std=(1, 1, 1) after a normalisation"
        )
    if fills and past.known and not past.scaled and not run.grey_levels:
        raise ValueError(
            f"mean and std must be in grey levels 0 … 255, as these images are, got {run.mean} and "
            f"{run.std}; multiply both by 255 if they are those of [0, 1], and for a black fill "
            'pass fill="zero"'
        )
    if size is not None and past.size is not None and tuple(size) != past.size:
        raise ValueError(
            f"size must be (h, w) of the images, {past.size} by the graph, got {tuple(size)}; pass "
            "theirs, or leave size out"
        )
    if guided:
        _check_frame(past, window)
    return past.size is not None


def _check_frame(past: History, window: Sequence[DataNode] | None) -> None:
    """Raise ValueError where the map of the whole image would not be laid over the right crop."""
    drawn = "start, size = fn.random_crop_generator(shapes, …) and fn.decoders.image_slice"
    if past.flipped or past.turned:
        how = "be flipped" if past.flipped else "keep the orientation that they are stored with"
        raise ValueError(
            f"images must not {how} before the stage, got those of {past.flipped or past.turned}: "
            "the map of the upright image would lie another way round; call the stage first, or do "
            "without a cache"
        )
    if window is None:
        if past.cropped:
            raise ValueError(
                f"window must be given where images are cropped, here by {past.cropped}: the map "
                f"of the whole image would be laid over the crop; draw it by {drawn}, which "
                "gives the same one, and pass window=(start, size, shapes)"
            )
        return
    if graph.output_of(window[0], "RandomCropGenerator") == 1 or (
        graph.output_of(window[1], "RandomCropGenerator") == 0
    ):
        raise ValueError(
            "window must be (start, size, shapes), got size and start the other way round"
        )
    draws = graph.crop_draws(*window[:2])
    as_drawn = graph.output_of(window[0], "RandomCropGenerator") == 0
    if not draws or not (past.cropped or past.known):
        return  # the caller made it, or an operator that is unknown here
    if not past.cropped:
        raise ValueError(
            "window must be left out where the whole image is seen, and nothing crops these images;"
            f" crop by {drawn}, or leave it out"
        )
    if past.crops > 1 and as_drawn:
        raise ValueError(
            f"window must be the crop that is seen, but {past.cropped} crops once more; crop once, "
            "or pass the window of both crops together"
        )
    if past.late and as_drawn and graph.output_of(window[2], "PeekImageShape") is not None:
        raise ValueError(
            f"window must be in pixels of the image that is cropped, but {past.cropped} crops one "
            f"that was resized before; crop first, by {drawn}, or draw the crop for "
            "images.shape() and pass that as shapes"
        )
    if past.drawn_by & draws.keys():
        return
    if past.fused is not None:
        same = past.fused.seed is not None and past.fused in draws.values()
    else:
        same = not (past.drawn_by or past.known)
    if not same:
        raise ValueError(
            f"window must be the crop that is seen, but {past.cropped} cuts another than this "
            f"fn.random_crop_generator draws; draw it by {drawn}, and use the same start and size "
            "for the crop and for the window"
        )


@do_not_convert
def check_sources(images: DataNode, ids: DataNode, window: Sequence[DataNode] | None) -> None:
    """Raise ValueError where images, ids and window are not of the same samples in one order."""
    seen = graph.sources(images)
    of_window = frozenset().union(*(graph.sources(node) for node in window or ()))
    for what, readers in (("ids", graph.sources(ids)), ("window", of_window)):
        if seen and readers and not seen & readers:
            raise ValueError(
                f"{what} must be of the samples that the images are of, got those of the reader "
                f"{', '.join(sorted(readers))}, and images of {', '.join(sorted(seen))}; take both "
                "from one reader"
            )
    past = history(images)
    if past is not None and past.permuted != graph.permutations(ids):
        raise ValueError(
            "ids must be in the order of the images, but fn.permute_batch has changed that of one "
            "of them alone; permute both by the same indices, or call the stage first"
        )


def check_reader(
    name: str, meta: Mapping[str, Any], *, epoch_size: int, num_shards: int, batch_size: int
) -> None:
    """Raise ValueError where the stage would count other epochs than the reader.

    name, meta: the reader's, meta as DALI's reader_meta gives it. The numbers are the stage's.
    """
    size, shards = meta["epoch_size"], meta["number_of_shards"]
    if shards != num_shards:
        raise ValueError(
            f"num_shards of the stage is {num_shards}, of the reader {name!r} {shards}, so the "
            f"stage would count other epochs; give both the same, here num_shards={shards}"
        )
    if size != epoch_size:
        raise ValueError(
            f"the stage counts epochs of {epoch_size} samples, the reader {name!r} has {size}; "
            f"give the index the samples that are read, or the stage epoch_size={size} if the "
            "others are left out on purpose"
        )
    if not meta["pad_last_batch"] and size % (shards * batch_size):
        raise ValueError(
            f"pad_last_batch must be True in the reader {name!r}: its {size} samples are no whole "
            f"number of batches of {batch_size} on {shards} shard(s), so without it an epoch ends "
            "within a batch, and the stage would count other epochs"
        )


class EachOnce:
    """Watches the ids of one epoch, in which a reader gives every sample once.

    Class labels that were passed as ids are places in the index too, but come again and again.
    """

    def __init__(self, index: ImageIndex) -> None:
        self._seen = np.zeros(len(index), bool)
        self._classes, self._highest = index.num_classes, -1

    def look(self, ids: np.ndarray) -> None:
        """Raise ValueError for an id that came before, as long as all ids could be labels.

        ids: int64 [B], places in the index, without those that pad a shard.
        """
        again = self._seen[ids]
        self._seen[ids] = True
        self._highest = max(self._highest, int(ids.max(initial=-1)))
        if self._highest > self._classes:
            return  # a sampler may want a sample twice
        if not again.any() and len(np.unique(ids)) < len(ids):
            again = np.bincount(ids)[ids] > 1
        if again.any():
            raise ValueError(
                f"ids must be places in the index, each of which a reader gives once an epoch, but "
                f"{int(ids[again][0])} came twice: are they class labels? Pass {_BY_NAME}"
            )


def repeats(ids: np.ndarray) -> bool:
    """Whether a batch has a sample more than once, as batches of class labels do. ids: int64 [B]. A
    reader may fill up its last batch with copies of the last sample: these do not count."""
    others = np.flatnonzero(ids != ids[-1:])
    ids = ids[: others[-1] + 2] if len(others) else ids[:1]
    return len(np.unique(ids)) < len(ids)


def check_window(window: Sequence[DataNode]) -> None:
    """Raise ValueError unless window has three entries."""
    if len(window) != 3:
        raise ValueError(
            f"window must be (start, size, shapes), got {len(window)} entries; shapes is what "
            "fn.peek_image_shape gives"
        )


def check_frames(window: np.ndarray) -> None:
    """Raise ValueError for windows that show nothing of their image.

    window: float64 [B, 6], start, size and the shape of the image, in pixels.
    """
    start, size, shape = window[:, :2], window[:, 2:4], window[:, 4:]
    wrong = (size < 1) | (shape < 1) | (start >= shape) | (start + size <= 0)
    if wrong.any():
        row = window[int(wrong.any(axis=1).argmax())].tolist()
        raise ValueError(
            "window must be (start, size, shapes) in pixels of the upright image, (y, x) and (h, "
            f"w), got {row[:2]}, {row[2:4]}, {row[4:]}; multiply relative ones by the shape, which "
            "fn.peek_image_shape gives as HWC"
        )


def checked_size(size: Any) -> tuple[int, int] | None:
    """(h, w) in whole pixels, or None. Raises ValueError for anything else."""
    if size is None:
        return None
    values = list(size) if isinstance(size, tuple | list | np.ndarray) else []
    if len(values) != 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in values):
        raise ValueError(f"size must be (h, w) of the images in whole pixels, got {size!r}")
    return int(values[0]), int(values[1])
