"""Refuses a stage that is wired wrongly, before it gives a wrong result without a word.

What the graph tells is looked at when it is made; what the reader tells, and whether ids repeat,
when the pipeline runs. Every refusal names what was found, and what to do instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nvidia.dali.pipeline import do_not_convert

from scae_dali import graph
from scae_dali.dataset import ImageIndex
from scae_dali.methods.base import DataNode, Run

__all__ = ["EachOnce", "check_ids", "check_images", "check_reader", "checked_size"]

_READ = "fn.readers.file(files=list(index.files), file_root=index.root, …), without labels="
_BY_NAME = 'ids=fn.get_property(jpegs, key="source_info")'


@do_not_convert
def check_ids(ids: DataNode, index: ImageIndex) -> graph.Origin | None:
    """Where ids come from, None where that is unknown.

    Raises ValueError for what cannot be ids: encoded images, class labels, another list of files.
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
    """Raises ValueError unless a file reader's labels are places in the index."""
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
) -> None:
    """Raises ValueError where the graph shows that images are not as the stage takes them.

    guided: whether maps of the whole upright image are laid over them. fills: whether the
    method fills regions, or mixes in images, in their values.
    """
    past = graph.history(images)
    if past is None:
        return
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
            f"{run.std}; multiply both by 255 if they are those of [0, 1]"
        )
    if size is not None and past.size is not None and tuple(size) != past.size:
        raise ValueError(
            f"size must be (h, w) of the images, {past.size} by the graph, got {tuple(size)}; pass "
            "theirs, or leave size out"
        )
    if guided:
        _check_frame(past, window)


def _check_frame(past: graph.History, window: Sequence[DataNode] | None) -> None:
    """Raises ValueError where the map of the whole image would not lie where the crop is."""
    drawn = "start, size = fn.random_crop_generator(shapes, …) and fn.decoders.image_slice"
    if past.flipped:
        raise ValueError(
            f"images must not be flipped before the stage, got those of {past.flipped}: the map "
            "would lie the other way round; call the stage first, or flip without a cache"
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
    if past.known and not past.cropped:
        raise ValueError(
            "window must be left out where the whole image is seen, and nothing crops these images;"
            f" crop by {drawn}, or leave it out"
        )
    if past.crops > 1 and graph.output_of(window[0], "RandomCropGenerator") == 0:
        raise ValueError(
            f"window must be the crop that is seen, but {past.cropped} crops once more; crop once, "
            "or pass the window of both crops together"
        )
    generators = graph.crop_generators(*window[:2])
    if past.fused_seed is not None or "image_random_crop" in (past.cropped or ""):
        if past.fused_seed is None or past.fused_seed not in generators.values():
            raise ValueError(
                f"window must be the crop that is seen, but {past.cropped} draws one of its own; "
                f"draw it by {drawn}"
            )
    elif past.generators and generators and not past.generators & generators.keys():
        raise ValueError(
            f"window must be the crop that is seen, but {past.cropped} cuts that of another "
            "fn.random_crop_generator; draw one, and use it for both"
        )


def check_reader(
    name: str, meta: Mapping[str, Any], *, epoch_size: int, num_shards: int, batch_size: int
) -> None:
    """Raises ValueError where the stage would count other epochs than the reader.

    meta: DALI's reader_meta of this reader; the numbers are the stage's.
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
    """Watches the ids that a reader gives in one epoch, where a sample that comes twice is none.

    Class labels that were passed as ids look like places in the index, but for this. samples: of
    the index.
    """

    def __init__(self, samples: int) -> None:
        self._seen = np.zeros(samples, bool)

    def look(self, ids: np.ndarray) -> None:
        """ids: int64 [B], within the index, none of them padding. Raises ValueError for an id that
        came before."""
        again = self._seen[ids]
        self._seen[ids] = True
        if not again.any() and len(np.unique(ids)) < len(ids):
            again = np.bincount(ids)[ids] > 1
        if again.any():
            raise ValueError(
                f"ids must be places in the index, each of which a reader gives once an epoch, but "
                f"{int(ids[again][0])} came twice: are they class labels? Pass {_BY_NAME}"
            )


def checked_size(size: Any) -> tuple[int, int] | None:
    """(h, w) of whole pixels; raises ValueError for anything else but None."""
    if size is None:
        return None
    pair = isinstance(size, tuple | list) and len(size) == 2
    if not pair or not all(isinstance(n, int | np.integer) and n >= 1 for n in size):
        raise ValueError(f"size must be (h, w) of the images in whole pixels, got {size!r}")
    return int(size[0]), int(size[1])
