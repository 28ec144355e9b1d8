"""Count how often the peak of a saliency map lies on the object (the pointing game).

    python tools/pointing_game.py --data demo/data --cache demo/run/saliency.lmdb
    python tools/pointing_game.py --data /data/imagenet --cache imagenet.lmdb --boxes boxes.txt

A hit is a map whose peak lies in a box of the object (Zhang et al., "Top-down neural attention by
excitation backprop", IJCV 2018). `--boxes` names a text file of boxes. Without it they are those of
`objects.json` beside train/, as tools/make_demo_data.py writes them. The rate of random peaks, the
mean area of an image's boxes, is printed beside the rate of hits.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from scae_dali.cache import CacheError, SaliencyCache
from scae_dali.commands.program import run_program
from scae_dali.data.index import DatasetError, ImageIndex
from tools.common.about import write_json
from tools.common.options import add_data, output_file, parser_of, train_folder

Boxes = Mapping[int, np.ndarray]  # sample -> float [M, 4], (y, x, h, w) as shares of the frame


def pointing_game(maps: np.ndarray, boxes: Iterable[np.ndarray]) -> np.ndarray:
    """maps: uint8 [N, h, w] over the full frame. boxes: float [M, 4] for each, (y, x, h, w) as
    shares of it. Returns bool [N]: the centre of the map's strongest cell lies in a box."""
    n, h, w = maps.shape
    peak = maps.reshape(n, -1).argmax(1)
    hits = []
    for y, x, own in zip((peak // w + 0.5) / h, (peak % w + 0.5) / w, boxes, strict=True):
        inside_y = (own[:, 0] <= y) & (y <= own[:, 0] + own[:, 2])
        inside_x = (own[:, 1] <= x) & (x <= own[:, 1] + own[:, 3])
        hits.append((inside_y & inside_x).any())
    return np.array(hits, bool)


def area(boxes: np.ndarray) -> float:
    """Share of the frame that boxes cover together. boxes: float [M, 4], (y, x, h, w) in [0, 1]."""
    y, x = (np.unique([boxes[:, i], boxes[:, i] + boxes[:, i + 2]]) for i in (0, 1))
    covered = 0.0
    for top, bottom in itertools.pairwise(y):
        row = boxes[(boxes[:, 0] <= top) & (bottom <= boxes[:, 0] + boxes[:, 2])]
        for left, right in itertools.pairwise(x):
            if ((row[:, 1] <= left) & (right <= row[:, 1] + row[:, 3])).any():
                covered += (bottom - top) * (right - left)
    return covered


def of_demo(data: Path, index: ImageIndex) -> Boxes:
    """The boxes of `objects.json`, one for every training image."""
    known = json.loads((data / "objects.json").read_text())
    if missing := [name for name in index.files if f"train/{name}" not in known]:
        raise DatasetError(
            f"objects.json in {str(data)!r} must have the box of every training image, it has none "
            f"of 'train/{missing[0]}'; tools/make_demo_data.py writes it, or give --boxes"
        )
    return {i: np.array([known[f"train/{name}"]]) for i, name in enumerate(index.files)}


def read_boxes(path: Path, index: ImageIndex) -> Boxes:
    """The boxes of a text file, for the images that it names. A line is `path x0 y0 x1 y1`, in
    pixels of the upright image; a path is relative to the folder of the classes, or to the one
    above it. Images of the file that are not in the index are left out.

    Raises DatasetError for another line, a box outside its image, and if no image is in the index.
    """
    place = {name: i for i, name in enumerate(index.files)}
    folder = f"{Path(index.root).name}/"
    found: dict[int, list[tuple[float, ...]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        name, *corners = line.rsplit(maxsplit=4)
        try:
            x0, y0, x1, y1 = map(float, corners)
        except ValueError:
            raise DatasetError(
                f"{str(path)!r}, line {number}: {line!r} is not `path x0 y0 x1 y1`, with the "
                "corners of a box in pixels"
            ) from None
        i = place.get(name, place.get(name.removeprefix(folder)))
        if i is None:
            continue
        with Image.open(Path(index.root) / index.files[i]) as file:
            turned = file.getexif().get(0x0112, 1) > 4  # the EXIF orientation swaps the sides
            width, height = file.size[::-1] if turned else file.size
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise DatasetError(
                f"{str(path)!r}, line {number}: the box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) must lie "
                f"in its image, {width}x{height} px, with x0 < x1 and y0 < y1"
            )
        box = (y0 / height, x0 / width, (y1 - y0) / height, (x1 - x0) / width)
        found.setdefault(i, []).append(box)
    if not found:
        raise DatasetError(
            f"{str(path)!r} has no box of an image in {str(index.root)!r}; its paths must be like "
            f"{index.files[0]!r}"
        )
    return {i: np.array(found[i]) for i in sorted(found)}


def play(data: Path, cache_path: Path, boxes_path: Path | None = None) -> dict[str, float]:
    """The figures for the training images of `data` that have boxes."""
    index = ImageIndex(train_folder(str(data)))
    boxes = of_demo(data, index) if boxes_path is None else read_boxes(boxes_path, index)
    maps, found = SaliencyCache(cache_path, index=index).read(np.array(list(boxes)))
    usable = found & (maps.max((1, 2)) > maps.min((1, 2)))
    hits = pointing_game(maps, boxes.values()) & usable
    return {
        "images": len(boxes),
        "usable_maps": float(usable.mean()),
        "hit_rate": float(hits[usable].mean()) if usable.any() else 0.0,
        "chance": float(np.mean([area(own) for own in boxes.values()])),
    }


def main() -> None:
    parser = parser_of(__doc__)
    add_data(
        parser,
        type=Path,
        required=True,
        help="folder that holds train/ and, without --boxes, objects.json, as make_demo_data.py "
        "writes them",
    )
    parser.add_argument(
        "--boxes",
        type=Path,
        help="text file of boxes; each line is `path x0 y0 x1 y1`, in pixels of the upright image; "
        "an image may have several boxes, and images without one are left out",
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder of the saliency cache of these images"
    )
    parser.add_argument("--json", type=output_file, help="write the figures to this file as JSON")
    arguments = parser.parse_args()
    try:
        figures = play(arguments.data, arguments.cache, arguments.boxes)
    except (CacheError, DatasetError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"pointing game: {figures['hit_rate']:.1%} of {figures['usable_maps']:.1%} usable maps hit "
        f"(chance {figures['chance']:.1%})"
    )
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    sys.exit(run_program(main))
